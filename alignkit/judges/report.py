"""How good a preference model is on held-out pairs: accuracy, calibration, whether the order it is asked in matters."""

import torch
from torch import Tensor

BINS = 10


def preference_figures(probability: Tensor, bias: Tensor | None = None) -> dict[str, float]:
    """Figures of n held-out pairs from P(the better one wins) [n], symmetrised over both orders.

    `accuracy`: share above 1/2, ties counting half. `calibration_error`: |accuracy - confidence| over ten bins of confidence
    max(P, 1 - P), weighted by their size (Guo et al. 2017, arXiv:1706.04599, eq. 3). `brier`: mean of (1 - P)^2.
    `bias` [n] is P(first wins | a, b) + P(first wins | b, a) - 1, 0 for a judge to whom the order is nothing;
    `position_bias` is its mean (> 0: prefers what stands first), `position_inconsistency` the mean of its size.
    """
    p = probability.double()
    right = torch.where(p == 0.5, 0.5, (p > 0.5).double())
    confidence = torch.maximum(p, 1 - p)
    bins = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, right - confidence)
    figures = {
        "accuracy": float(right.mean()),
        "calibration_error": float(gaps.abs().sum() / len(p)),
        "brier": float(((1 - p) ** 2).mean()),
    }
    if bias is not None:
        figures |= {"position_bias": float(bias.double().mean()), "position_inconsistency": float(bias.double().abs().mean())}
    return figures
