"""Reward functions as people write them for TRL, and a verifier as they write it for alignkit."""

import asyncio

SEEN = []  # (columns, global step) of each call of `full`


def full(
    prompts, completions, completion_ids, trainer_state, log_extra=None, log_metric=None, **columns
):
    """Every name of TRL's signature, used (the two for logging came with TRL 1.0); None where it
    does not apply.
    """
    SEEN.append((set(columns), trainer_state.global_step))
    if log_extra is not None and log_metric is not None:
        log_extra("shown", list(completions))
        log_metric("longest", max(map(len, completion_ids)))
    return [
        len(ids) + 0.1 * text.count("1") if ids else None
        for ids, text in zip(completion_ids, completions)
    ]


async def later(completions, **_):
    await asyncio.sleep(0)
    return [0.5 * len(text) for text in completions]


def judged(prompt, completion, **columns):
    return float(len(completion))
