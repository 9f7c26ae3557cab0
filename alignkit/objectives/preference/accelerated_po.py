"""Accelerated preference optimisation: iterated DPO with Nesterov's momentum on the policy."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, PairBatch, Plan, TokenLogps
from alignkit.objectives.base import Objective, PairObjective
from alignkit.objectives.preference.dpo import dpo_loss


class AcceleratedPO(PairObjective):
    """Accelerated preference optimisation (He et al. 2024,
    arXiv:2410.06293): DPO from an extrapolated past.

    Each iteration ends where the recipe's `target` section copies the policy. The next one is
    anchored to target (target / previous)^alpha, of the last two copies; after T exact iterations
    the policy is ref exp(reward / beta sum_{t <= T} (1 - alpha^t) / (1 - alpha)). In practice the
    paper extrapolates weights; here it is the policies. "Anchored preference optimisation" is
    something else.
    """

    paper: ClassVar[str] = "He et al. 2024, arXiv:2410.06293, algorithm 1"
    equation: ClassVar[str] = (
        "L = -log sigmoid(beta [log pi/a(w) - log pi/a(l)]), a = target (target / previous)^alpha"
    )

    beta: PositiveFloat = Field(
        0.1, description="strength of the KL to the extrapolated past of one iteration"
    )
    alpha: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.3, description="momentum; 0: DPO from the last copy"
    )

    @property
    def plan(self) -> Plan:
        return Plan("pair", anchors=("target", "previous"))

    def anchor(self, tokens: TokenLogps) -> Tensor:
        """Log-probs of the extrapolated past [B], not normalised: pairs cancel the constant."""
        target = tokens.sequence("target")
        return target + self.alpha * (target - tokens.sequence("previous"))

    def loss(self, batch: PairBatch) -> LossTerms:
        policy = (batch.chosen.sequence(), batch.rejected.sequence())
        past = (self.anchor(batch.chosen), self.anchor(batch.rejected))
        chosen, rejected = (self.beta * (own - old) for own, old in zip(policy, past))
        return batch.rows(
            "accelerated_po", dpo_loss(*policy, *past, beta=self.beta), rewards=(chosen, rejected)
        )

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(alpha=0.0)]
