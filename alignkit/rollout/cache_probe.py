"""Which cache a model samples with: found out by trying, for every architecture alike.

Sampling with a wrong cache goes unnoticed otherwise: the tokens still look like text, and their
log-probs are not those of the policy. So before a model's first sample a few rows go through it
token by token, as in sampling, and the log-probs are compared with those of whole rows.
"""

import logging
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from alignkit.errors import ModelError, first_line
from alignkit.policies.module import causal_lm, context_length, layer_windows
from alignkit.policies.probe import HALF_TOLERANCE, HEAD_TOLERANCE, REFUSALS
from alignkit.rollout.cached_model import CachedModel, KeptRow, UncachedModel
from alignkit.rollout.protocol import Models

# Prompts are a little longer than the model's sliding window, up to this many tokens.
LONGEST_WINDOW = 1024
NEW_TOKENS = 5

log = logging.getLogger("alignkit")
_chosen: WeakKeyDictionary[nn.Module, type[CachedModel]] = WeakKeyDictionary()
_goes_on: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def sampling_model(models: Models, name: str, weight: float) -> CachedModel:
    """The model of a draw, with its cache where that gives the log-probs of whole rows, else without
    (which is slow and noted once). ModelError where neither does. Each network is tried once.
    """
    with models.model(name) as model:
        network = causal_lm(model)
        if network in _chosen:
            return _chosen[network](models, name, weight)

        tolerance = _tolerance(model)
        prompts, continuations = _rows(model)
        try:
            expected = [
                _of_whole_row(model, prompt, tokens)
                for prompt, tokens in zip(prompts, continuations)
            ]
        except REFUSALS as error:
            raise ModelError(
                f"sampling: {type(network).__name__} fails on a row of {len(prompts[0])} tokens: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error

    # A model that has gone to nan is a matter for the sampler, which says so.
    if not all(bool(torch.isfinite(logps).all()) for logps in expected):
        return CachedModel(models, name, weight)

    reasons = []
    for kind in (CachedModel, UncachedModel):
        reason = _disagrees(kind(models, name, weight), prompts, continuations, expected, tolerance)
        if not reason:
            _chosen[network] = kind
            break
        reasons.append(reason)
    else:
        raise ModelError(
            f"sampling: {type(network).__name__} gives other log-probs token by token than for "
            f"whole rows: with its cache {reasons[0]}, without {reasons[1]}; alignkit cannot sample "
            "from it"
        )

    if kind is UncachedModel:
        log.warning(
            "sampling from %s without its cache, which is slow: with the cache %s",
            type(network).__name__,
            reasons[0],
        )
    return kind(models, name, weight)


@torch.no_grad()
def goes_on(models: Models, sampled: CachedModel) -> bool:
    """Whether a model that goes on from rows that were kept gives the log-probs of whole rows; else
    each turn of an episode is read from its beginning. Each network is tried once.
    """
    with models.model(sampled.name) as model:
        network = causal_lm(model)
        if network not in _goes_on:
            first, second = (type(sampled)(models, sampled.name, 1.0) for _ in range(2))
            _goes_on[network] = _agree_when_kept(model, first, second)
        return _goes_on[network]


def _agree_when_kept(model: nn.Module, first: CachedModel, second: CachedModel) -> bool:
    """Whether the second one goes on from what the first one has read."""
    prompts, continuations = _rows(model)
    if isinstance(first, UncachedModel) or min(map(len, prompts)) < 2:
        return False

    # Rows of different lengths, of which the rests have different lengths as well.
    read = [prompts[0][: len(prompts[0]) // 2], prompts[1][:-1]]
    first.prefill(read, [NEW_TOKENS] * len(read))
    if not first.can_keep:
        return False
    rows = [first.kept(row, len(tokens)) for row, tokens in enumerate(read)]
    expected = [
        _of_whole_row(model, prompt, tokens) for prompt, tokens in zip(prompts, continuations)
    ]
    tolerance = _tolerance(model)
    return not _disagrees(second, prompts, continuations, expected, tolerance, rows)


def _tolerance(model: Any) -> float:
    """By how much log-probs may differ; to be asked where the model's autocast is on."""
    autocast = torch.is_autocast_enabled(model.device.type)
    half = model.dtype in (torch.bfloat16, torch.float16) or autocast
    return HALF_TOLERANCE if half else HEAD_TOLERANCE


def _rows(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """A long and a short random prompt, and a continuation of NEW_TOKENS tokens for each."""
    config = model.config
    windows = [window for window in layer_windows(config).values() if window]
    longest = max((window for window in windows if window <= LONGEST_WINDOW), default=0) + 8
    longest = max(1, min(longest, context_length(model) - NEW_TOKENS))

    # Token 0 and its neighbours are often special: pads of which some models take notice.
    vocab = config.get_text_config().vocab_size
    first = min(3, vocab - 1)
    rng = torch.Generator().manual_seed(0)
    sizes = (longest, max(1, longest // 2), NEW_TOKENS, NEW_TOKENS)
    rows = [torch.randint(first, vocab, (size,), generator=rng) for size in sizes]
    return rows[:2], rows[2:]


def _of_whole_row(model: nn.Module, prompt: Tensor, continuation: Tensor) -> Tensor:
    """Log-probs of the continuation [T] after the prompt, from one forward without a cache."""
    device = next(model.parameters()).device
    ids = torch.cat([prompt, continuation])[None].to(device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return _logps(logits[0, len(prompt) - 1 : -1], ids[0, len(prompt) :])


def _disagrees(
    model: CachedModel,
    prompts: list[Tensor],
    continuations: list[Tensor],
    expected: list[Tensor],
    tolerance: float,
    kept: Sequence[KeptRow] = (),
) -> str:
    """How the model's log-probs, token by token, differ from those `expected`; empty where they do
    not. Rows are repeated and dropped on the way, as completions are. `kept`: see `prefill`.
    """
    try:
        logits = model.prefill(prompts, [NEW_TOKENS] * len(prompts), kept)
        rows = torch.tensor([0, 1, 0, 1], device=logits.device)
        model.select(rows)
        logits = logits[rows]

        for position in range(NEW_TOKENS):
            tokens = torch.stack([continuations[row][position] for row in rows.tolist()])
            tokens = tokens.to(logits.device)
            wanted = torch.stack([expected[row][position] for row in rows.tolist()])
            difference = float((_logps(logits, tokens) - wanted).abs().max())
            if not difference <= tolerance:
                return f"they differ by {difference:.1e}"
            if position == 2:
                remaining = torch.tensor([1, 2, 3], device=logits.device)
                model.select(remaining)
                rows = rows[remaining]
                tokens = tokens[remaining]
            if position + 1 < NEW_TOKENS:
                logits = model.advance(tokens)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        return f"it fails ({type(error).__name__}: {first_line(error)})"
    return ""


def _logps(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probs of the tokens [T] under logits [T, V], in float32 or wider.

    A model that hands on its states is looked at in the same way, at numbers of the states.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    places = tokens[:, None] % logits.shape[-1]
    return wide.log_softmax(-1).gather(-1, places)[:, 0]
