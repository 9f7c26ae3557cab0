"""How large the gradients of single completions are, in the head alone: they need no backward through
the model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from alignkit.batches import Bundle
from alignkit.policies.head import Head, chunk_rows
from alignkit.policies.layout import build_rows
from alignkit.policies.pair import PolicyPair


@torch.no_grad()
def head_gradient_norms(
    pair: PolicyPair, bundles: Sequence[Bundle], budget: int
) -> list[list[float]]:
    """For each completion of each bundle, the norm of the gradient of its log-prob (of its trained
    tokens, added up) by the weight of the policy's head. `budget`: tokens per forward pass.

    The weight is that of a head whose logits are W h: of an adapter on the head, what it adds counts
    as part of W, and tied embeddings count as a head only.
    """
    norms: dict[int, list[float]] = {}
    for group in pair.micro_batches(bundles, budget):
        chunk = [bundles[i] for i in group]
        rows = build_rows(chunk, pair.layout, pair.device, packing=pair.packing)
        states = pair.base.eval()(rows, hidden_only=True)
        owners = rows.targets // rows.shape[1]

        every = iter(
            summed_norm(states["head"], states["hidden"][owners == n], rows.labels[owners == n])
            for n in range(rows.shape[0])
        )
        norms |= {i: [next(every) for _ in b.completions] for i, b in zip(group, chunk)}
    return [norms[i] for i in range(len(bundles))]


def summed_norm(head: Head, hidden: Tensor, labels: Tensor) -> float:
    """The norm of the gradient of the sum of the labels' log-probs by the head's weight [V, H], from
    hidden states [T, H] and labels [T].
    """
    logits = head.module(hidden[:1])
    gradient = logits.new_zeros((logits.shape[-1], hidden.shape[-1]))
    rows = chunk_rows(logits.shape[-1], hidden.device)

    for states, wanted in zip(hidden.split(rows), labels.split(rows)):
        with torch.enable_grad():
            logits = head.module(states.detach()).detach().requires_grad_()
            wide = torch.promote_types(logits.dtype, torch.float32)
            logps = head.shaped(logits).log_softmax(-1, dtype=wide)
            chosen = logps.gather(-1, wanted.unsqueeze(-1)).sum()
            (by_logits,) = torch.autograd.grad(chosen, logits)
        gradient += by_logits.mT @ states.to(by_logits.dtype)
    return float(gradient.norm())
