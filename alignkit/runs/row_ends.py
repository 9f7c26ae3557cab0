"""Whether the completions of a run end with the end token, for objectives that read a number there."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from alignkit.batches import Bundle
from alignkit.config.data import DataConfig
from alignkit.data.report import Report
from alignkit.errors import DataError


def check_row_ends(
    bundles: Sequence[Bundle], tokenizer: Any, config: DataConfig, report: Report
) -> None:
    """DataError for completions whose last trained token is not the end token. `report` is on the
    rows of `bundles`, which were read by `config`.

    What a value head says at a token has read the tokens before it alone, so the number of a whole
    completion stands where its end token is predicted.
    """
    end = tokenizer.eos_token_id
    lengths = [
        len(bundle.prompt) + len(ids)
        for bundle in bundles
        for ids, mask in zip(bundle.completions, bundle.masks)
        if not _ends(ids, mask, end)
    ]
    if not lengths:
        return

    cut = 0
    if report.count("truncated"):
        cut = sum(length >= config.max_length for length in lengths)
    raise DataError(
        f"{report.source}: {len(lengths)} completions do not end with the end token, where this "
        f"objective reads the reward of the whole completion; "
        f"{_advice(len(lengths), cut, end, config, report)}"
    )


def _advice(without: int, cut: int, end: int | None, config: DataConfig, report: Report) -> str:
    """What gives an end to `without` completions, of which `cut` have lost theirs to the cut."""
    if end is None:
        return "the tokenizer has none"

    sentences = []
    if cut:
        longer = f"set it to {max(report.lengths)} or more"
        or_prompts = (
            ", or where the completions alone fit data.truncate=start, which cuts the prompts"
        )
        at = f"{cut} of them were cut at data.max_length={config.max_length}"
        sentences.append(f"{at}; {longer}{or_prompts if config.truncate == 'end' else ''}")
    if cut < without:
        rest = "for the others " if cut else ""
        chat = "or for a chat take a template that writes it last"
        sentences.append(f"{rest}set data.append_eos=true, {chat}")
    return "; ".join(sentences)


def _ends(ids: Tensor, mask: Tensor, end: int | None) -> bool:
    trained = ids[mask]
    return end is not None and len(trained) > 0 and int(trained[-1]) == end
