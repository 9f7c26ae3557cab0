"""TDPO: token-level direct preference optimisation, which
controls the forward KL of each response's prefixes.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.batches import LossTerms, PairBatch, Plan
from alignkit.errors import ConfigError
from alignkit.objectives.base import Objective, PairObjective, forward_kl, tilted
from alignkit.tensors import check_same_shape, pair_log_ratios


def tdpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    *,
    beta: float,
    alpha: float | None = None,
    version: Literal[1, 2] = 1,
) -> Tensor:
    """TDPO loss per pair: [B] x 6 -> [B]. `chosen_kl` and `rejected_kl` are sums over a response's
    tokens of KL(ref || pi) at its prefixes. Version 2 weighs their difference by `alpha` and stops
    the gradient of `chosen_kl`.

    Zeng et al. 2024, arXiv:2404.11999.
    """
    chosen, rejected = pair_log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps, chosen_kl=chosen_kl, rejected_kl=rejected_kl
    )
    if version not in (1, 2) or (version == 2 and alpha is None):
        raise ConfigError(
            f"tdpo_loss: version is {version!r}, alpha {alpha!r}; "
            "give version=1, or version=2 and an alpha"
        )

    if version == 1 or alpha is None:
        kl_gap = rejected_kl - chosen_kl
    else:
        kl_gap = alpha * (rejected_kl - chosen_kl.detach())
    return -logsigmoid(beta * (chosen - rejected) - beta * kl_gap)


class TDPO(PairObjective):
    """TDPO (Zeng et al. 2024, arXiv:2404.11999)."""

    paper: ClassVar[str] = (
        "Zeng et al. 2024, arXiv:2404.11999, TDPO1 (version 1) and TDPO2 (version 2)"
    )
    equation: ClassVar[str] = (
        "L = -log sigmoid(beta * [r(w) - r(l) - (D(l) - D(w))]), D = sum_t KL(ref || pi) at y_<t"
    )

    beta: PositiveFloat = Field(0.1, description="strength of the KL to the reference")
    alpha: Annotated[float, Field(ge=0)] = Field(
        0.5, description="weight of the KL difference; version 2 only"
    )
    version: Literal[1, 2] = Field(
        1, description="1: gradient through both KLs; 2: weighted, through the rejected one's only"
    )

    @property
    def plan(self) -> Plan:
        return Plan("pair", statistics={"forward_kl": forward_kl})

    def loss(self, batch: PairBatch) -> LossTerms:
        return self._loss(batch, "tdpo", "forward_kl")

    def _loss(self, batch: PairBatch, name: str, statistic: str) -> LossTerms:
        chosen = batch.chosen.sequence(statistic)
        rejected = batch.rejected.sequence(statistic)
        logps = batch.sequence_logps()
        ratios = pair_log_ratios(*logps)
        losses = tdpo_loss(
            *logps, chosen, rejected, beta=self.beta, alpha=self.alpha, version=self.version
        )
        rewards = (self.beta * (ratios[0] + chosen), self.beta * (ratios[1] + rejected))
        metrics = {
            f"{statistic}/chosen": chosen.detach(),
            f"{statistic}/rejected": rejected.detach(),
        }
        return batch.rows(name, losses, rewards=rewards) + LossTerms([], metrics)

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """Of one token: ref * exp(reward / beta), normalised. Version 2 has no closed form."""
        return tilted(reward, reference, self.beta) if self.version == 1 else None

    def backup(self, values: Tensor, reference: Tensor) -> Tensor | None:
        """The mean under the reference: version 1 improves on the
        reference by one step at each token.
        """
        return (reference.exp() * values).sum(-1) if self.version == 1 else None

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(version=1), cls(version=2)]
