"""What TRL logs of its own losses on rollouts, under its names, with the values of the objective that
has taken their place. Imports no trl.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from alignkit.batches import LossTerms, TokenLogps
from alignkit.integrations.trl_settings import has_one_ratio
from alignkit.integrations.trl_tensors import placed
from alignkit.kl import LOSS_ESTIMATORS
from alignkit.objectives.base import Objective
from alignkit.objectives.exploration import ENTROPY_TERM
from alignkit.tensors import masked_sum


def kl_per_token(objective: Objective, tokens: TokenLogps) -> dict[str, Tensor]:
    """TRL's `kl`, of each trained token [M]: the estimate of KL(policy || reference) that the loss
    adds, before its weight; k3 where the objective names no estimator. Empty without a reference.
    """
    if "reference" not in tokens.anchors:
        return {}
    name = getattr(objective, "kl", "k3")
    estimate = LOSS_ESTIMATORS[name if name in LOSS_ESTIMATORS else "k3"][0]
    with torch.no_grad():
        values = estimate(tokens.log_ratio, tokens.policy - tokens.get("behavior"))
    return {"kl": values[tokens.mask]}


def policy_loss(terms: LossTerms, losses: list[Tensor]) -> Tensor:
    """TRL's `policy_loss`, [1]: the sum of the reduced `losses` of the terms without the entropy
    bonus.
    """
    parts = zip(terms.terms, losses, strict=True)
    rest = [loss.detach() for term, loss in parts if term.name != ENTROPY_TERM]
    return torch.stack(rest).sum().unsqueeze(0)


def clipped_shares(
    objective: Objective, tokens: TokenLogps, metrics: Mapping[str, Tensor], side: str
) -> Tensor | None:
    """The share of each completion's tokens that is clipped on a side, "low" or "high": [N], nan in
    a completion without a token; 0 or 1 where the ratio is one per completion. None where the
    objective clips nothing.
    """
    values = metrics.get(f"clip_ratio/{side}_mean")
    if values is None or values.numel() != tokens.mask.sum() or has_one_ratio(objective):
        return values
    return masked_sum(placed(values, tokens.mask), tokens.mask) / tokens.mask.sum(-1)
