"""Trials at the start of a run: does alignkit compute this model's log-probs as the model does?

`check_head` compares one row with the model's own logits, `choose_layout` compares shared-prefix
rows with padded ones. Both use `probe_bundle`, three random completions of a random prompt.
"""

import torch

from alignkit.batches import Bundle
from alignkit.errors import ModelError, first_line
from alignkit.policies.layout import Layout, Rows, build_rows
from alignkit.policies.module import PolicyModule, causal_lm

# Largest difference of log-probs that is rounding: between the two layouts, from the model's own
# logits, and (for both) in half precision, which rounds in another order.
LAYOUT_TOLERANCE = 1e-4
HEAD_TOLERANCE = 1e-3
HALF_TOLERANCE = 0.25

# What models raise that cannot take a mask with branches.
REFUSALS = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    NotImplementedError,
    IndexError,
)


def probe_bundle(vocab: int, window: int | None, limit: int | None) -> Bundle:
    """A bundle that shows whether a model can branch: three completions, longer than the sliding
    window where there is one, and within the `limit` of positions.
    """
    length = (window or 0) + 8
    if limit is not None:
        length = min(length, limit - 8)
    rng = torch.Generator().manual_seed(0)
    prompt, *completions = (
        torch.randint(vocab, (n,), generator=rng) for n in (max(1, length), 5, 1, 4)
    )
    masks = [torch.ones(len(ids), dtype=torch.bool) for ids in completions]
    return Bundle(prompt, completions, masks)


def probe_rows(module: PolicyModule, bundle: Bundle) -> Rows:
    """The probe's bundle as padded rows where the module is."""
    return build_rows([bundle], "padded", next(module.parameters()).device)


@torch.no_grad()
def check_head(module: PolicyModule, bundle: Bundle) -> None:
    """Compare alignkit's head with the model's own logits on one bundle; ModelError if they differ,
    or if the model cannot be run the way that alignkit runs it.
    """
    rows = probe_rows(module, bundle)
    lm = causal_lm(module.model)
    try:
        mask = torch.ones_like(rows.input_ids)
        logits = lm(input_ids=rows.input_ids, attention_mask=mask, use_cache=False).logits
        logps = module(rows)["policy"].float()
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        raise ModelError(
            f"model.name_or_path: {type(lm).__name__} fails on a row of {rows.input_ids.shape[1]} "
            f"tokens: {type(error).__name__}: {first_line(error)}; alignkit trains causal language "
            "models that read text alone"
        ) from error

    logprobs = logits.flatten(0, 1)[rows.sources].float().log_softmax(-1)
    expected = logprobs.gather(-1, rows.labels[:, None])[:, 0]
    difference = float((logps - expected).abs().max())
    tolerance = HEAD_TOLERANCE if logits.dtype == torch.float32 else HALF_TOLERANCE
    if not difference <= tolerance:
        raise ModelError(
            f"the head of {type(lm).__name__} gives log-probs that differ from the model's own by "
            f"{difference:.1e}: it does something after its head module that alignkit does not "
            "know; please report the model's name"
        )


def choose_layout(module: PolicyModule, wanted: str, bundle: Bundle) -> tuple[Layout, str]:
    """Shared-prefix rows where the model gives the same log-probs for them, else padded rows.

    Returns the layout and a note for the user, empty if there is nothing to say. Raises ModelError
    where `wanted` is "shared_prefix" and the model cannot branch.
    """
    if wanted == "padded":
        return "padded", ""
    why = _cannot_branch(module, bundle)
    if not why:
        return "shared_prefix", ""

    message = f"this model cannot branch completions off one prompt: {why}"
    if wanted == "shared_prefix":
        raise ModelError(f"model.layout: {message}; use model.layout=auto or padded")
    return "padded", f"padded rows: {message}"


@torch.no_grad()
def _cannot_branch(module: PolicyModule, bundle: Bundle) -> str:
    """Why shared-prefix rows are not right for this model; empty where they are."""
    parameter = next(module.parameters())
    logps = {}
    layouts: tuple[Layout, Layout] = ("padded", "shared_prefix")
    try:
        for layout in layouts:
            rows = build_rows([bundle], layout, parameter.device, packing=module.packing)
            logps[layout] = rows.scatter(module(rows)["policy"].float())
    except REFUSALS as error:
        return f"it refuses the mask ({first_line(error)})"

    difference = float((logps["padded"] - logps["shared_prefix"]).abs().max())
    tolerance = LAYOUT_TOLERANCE if parameter.dtype == torch.float32 else HALF_TOLERANCE
    if difference <= tolerance:
        return ""
    return f"its log-probs differ by {difference:.1e} from separate rows"


@torch.no_grad()
def mass_beyond(module: PolicyModule, vocabulary: int, bundle: Bundle) -> float:
    """The largest probability that a model gives to the tokens from `vocabulary` on, at any
    position of the bundle's completions.
    """
    rows = build_rows([bundle], "padded", next(module.parameters()).device)
    # By the model's own forward, since the head of a sharded one is whole in there alone. What pads
    # a row stands behind its tokens, which do not see it.
    seen = torch.ones_like(rows.input_ids)
    logits = causal_lm(module.model)(input_ids=rows.input_ids, attention_mask=seen).logits
    laws = logits.flatten(0, 1)[rows.sources].float().softmax(-1)
    return float(laws[:, vocabulary:].sum(-1).max())
