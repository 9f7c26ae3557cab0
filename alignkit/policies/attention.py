"""Which attention kernel is fastest for a model on this machine: measured, where the recipe leaves
`model.attention` at auto on a GPU.
"""

import time
from collections.abc import Sequence

import torch

from alignkit.batches import Bundle, Plan, TokenLogps
from alignkit.errors import first_line
from alignkit.policies.module import causal_lm
from alignkit.policies.pair import PolicyPair
from alignkit.policies.probe import HALF_TOLERANCE, REFUSALS

ON_GPU = ("sdpa", "flex_attention")
REPEATS = 3  # timed forwards and backwards of each kernel; the fastest one counts
PAIRS = 16  # that are timed, with so many tokens of prompt and of each completion
PROMPT = 192
COMPLETION = 96


def set_kernel(pair: PolicyPair, kernel: str) -> None:
    """Have the policy and all anchors of its own kind attend with `kernel`."""
    anchors = [anchor.module for anchor in pair.anchors.values() if anchor.module is not None]
    for module in [pair.base, *anchors]:
        causal_lm(module.model).set_attn_implementation(kernel)


def choose_kernel(pair: PolicyPair, kernels: Sequence[str] = ON_GPU) -> dict[str, float]:
    """Let the policy attend with the fastest of `kernels`; seconds of a forward and backward with
    each, by name.

    A kernel that the model cannot use, or with which it computes other log-probs than with the
    first one, is left out and noted.
    """
    bundles = _pairs(pair.vocab_size)
    before = causal_lm(pair.base.model).config._attn_implementation
    seconds: dict[str, float] = {}
    expected: torch.Tensor | None = None

    for kernel in kernels:
        try:
            set_kernel(pair, kernel)
            logps = _pass(pair, bundles)
            times = [_timed(pair, bundles) for _ in range(REPEATS)]
        except REFUSALS as error:
            pair.notes.append(f"attention {kernel} cannot be used here: {first_line(error)}")
            continue
        expected = logps if expected is None else expected
        gap = float((logps - expected).abs().max())
        if not gap <= HALF_TOLERANCE:
            pair.notes.append(f"attention {kernel} computes other log-probs, by {gap:.1e}")
            continue
        seconds[kernel] = min(times)

    set_kernel(pair, min(seconds, key=seconds.__getitem__) if seconds else before)
    if seconds:
        listed = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items())
        pair.notes.append(f"attention of {PAIRS} pairs, forward and backward: {listed}")
    return seconds


def _pairs(vocabulary: int) -> list[Bundle]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(vocabulary, (length,), generator=generator)

    mask = torch.ones(COMPLETION, dtype=torch.bool)
    return [
        Bundle(ids(PROMPT), [ids(COMPLETION), ids(COMPLETION)], [mask, mask]) for _ in range(PAIRS)
    ]


def _pass(pair: PolicyPair, bundles: Sequence[Bundle]) -> torch.Tensor:
    """Log-probs [N, T] after a forward and a backward; gradients are left as they were: none."""
    tokens = pair.logps(bundles, Plan("pair", anchors=()), anchors=False)
    assert isinstance(tokens, TokenLogps)
    tokens.policy.sum().backward()
    for parameter in pair.parameters():
        parameter.grad = None
    return tokens.policy.detach()


def _timed(pair: PolicyPair, bundles: Sequence[Bundle]) -> float:
    _wait(pair.device)
    began = time.perf_counter()
    _pass(pair, bundles)
    _wait(pair.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
