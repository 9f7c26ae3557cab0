"""Targets from constraints: the law nearest to the reference in which features have given means.

Notation: P prompts with K samples each, F features. The target of a prompt is reference *
exp(sum_f lambda_f phi_f) / Z; one lambda serves all prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.errors import ConfigError, NumericsError, ShapeError

STEPS = 200  # of Newton's method; a few are enough where the means can be reached
TOLERANCE = 1e-12  # of the moments, in units of the feature's spread


@dataclass(frozen=True)
class MomentFit:
    """What was fitted: `lambdas` [F], the features' means before and after [F], and the effective
    number of samples of a prompt's target, on average over the prompts.
    """

    lambdas: Tensor
    before: Tensor
    moments: Tensor
    effective_samples: float


def fit_moments(
    features: Tensor,
    targets: Tensor,
    log_weights: Tensor | None = None,
    names: Sequence[str] = (),
) -> MomentFit:
    """The lambdas for which the features' means are `targets`: [P, K, F], [F], [P, K] -> [F].

    The samples stand for the reference by self-normalised importance sampling, with `log_weights`
    log reference - log sampler (left out: the reference sampled). Where they list a whole space,
    with the reference's log-probs as weights, the result is exact. Newton's method on the convex
    dual, mean over prompts of log Z - lambda * targets, in float64. ConfigError, with `names`, for a
    mean that the samples cannot have; NumericsError where the means cannot be had together. Source:
    Khalifa et al. 2021, arXiv:2012.11635, section 2.
    """
    features = features.double()
    targets = targets.double()
    if features.dim() != 3 or targets.shape != features.shape[-1:]:
        raise ShapeError(
            f"fit_moments: features {list(features.shape)} should be [P, K, F] and targets "
            f"{list(targets.shape)} [F]"
        )
    weights = torch.zeros(features.shape[:2], dtype=torch.float64)
    start = (weights if log_weights is None else log_weights.double()).log_softmax(-1)
    _check_reachable(features, start, targets, names)

    lambdas = torch.zeros_like(targets)
    spread = features.flatten(0, 1).std(0, correction=0).clamp(min=torch.finfo(torch.float64).tiny)
    gap = _moments(features, start, lambdas)[0] - targets
    before = gap + targets
    for _ in range(STEPS):
        if bool((gap.abs() <= TOLERANCE * spread).all()):
            break
        moments, covariance = _moments(features, start, lambdas)
        gap = moments - targets
        lambdas = lambdas - _newton_step(features, start, targets, lambdas, gap, covariance)
    gap = _moments(features, start, lambdas)[0] - targets

    if not bool((gap.abs() <= 1e-9 * spread.clamp(min=1)).all()):
        raise NumericsError(
            "fit_moments: the means cannot be had together from these samples (they are off by up "
            f"to {float(gap.abs().max()):.2g}); draw more samples, or ask for less"
        )
    law = (start + features @ lambdas).log_softmax(-1)
    effective = float((1 / law.exp().square().sum(-1)).mean())
    return MomentFit(lambdas, before, gap + targets, effective)


def _moments(features: Tensor, start: Tensor, lambdas: Tensor) -> tuple[Tensor, Tensor]:
    """Means [F] and covariance [F, F] of the features under the target, averaged over prompts."""
    law = (start + features @ lambdas).softmax(-1)
    means = torch.einsum("pk,pkf->pf", law, features)
    centred = features - means.unsqueeze(1)
    covariance = torch.einsum("pk,pkf,pkg->fg", law, centred, centred) / len(features)
    return means.mean(0), covariance


def _dual(features: Tensor, start: Tensor, targets: Tensor, lambdas: Tensor) -> Tensor:
    """What the lambdas minimise, scalar."""
    return (start + features @ lambdas).logsumexp(-1).mean() - lambdas @ targets


def _newton_step(
    features: Tensor,
    start: Tensor,
    targets: Tensor,
    lambdas: Tensor,
    gap: Tensor,
    covariance: Tensor,
) -> Tensor:
    """What to subtract from the lambdas: Newton's step, halved until the dual falls."""
    step = torch.linalg.lstsq(covariance, gap.unsqueeze(-1), driver="gelsd").solution[:, 0]
    value = _dual(features, start, targets, lambdas)
    slope = gap @ step
    for _ in range(40):
        if _dual(features, start, targets, lambdas - step) <= value - 1e-4 * slope + 1e-15:
            break
        step = step / 2
        slope = slope / 2
    return step


def _check_reachable(
    features: Tensor, start: Tensor, targets: Tensor, names: Sequence[str]
) -> None:
    """ConfigError for a mean outside of what any law over the samples has."""
    live = (start > -torch.inf).unsqueeze(-1)
    lowest = features.masked_fill(~live, torch.inf).amin(1).mean(0)
    highest = features.masked_fill(~live, -torch.inf).amax(1).mean(0)
    for number, (low, target, high) in enumerate(
        zip(lowest.tolist(), targets.tolist(), highest.tolist())
    ):
        if not low < target < high:
            name = names[number] if names else f"feature {number}"
            raise ConfigError(
                f"{name}: a mean of {target:g} is out of reach, the samples allow more than "
                f"{low:g} and less than {high:g}; ask for a mean between, or draw more samples"
            )
