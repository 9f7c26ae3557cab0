"""Online IPO: squared loss on two fresh samples of the policy;
the core that EGPO, IPO-MD and Nash-MP share.
"""

from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import Draw, GameBatch, LossTerms, Plan, Term, TokenLogps
from alignkit.objectives.base import Objective
from alignkit.tensors import check_same_shape


def online_ipo_loss(
    policy_first_logps: Tensor,
    policy_second_logps: Tensor,
    reference_first_logps: Tensor,
    reference_second_logps: Tensor,
    preference_gap: Tensor,
    *,
    beta: float,
) -> Tensor:
    """(log pi/ref of the first - log pi/ref of the second - preference_gap / beta)^2 per pair: [B]
    x 5 -> [B].

    `preference_gap` is P(first > q) - P(second > q) against a common opponent q, or P(first >
    second) - 1/2 where both samples come from the opponent. It enters linearly in the gradient, so
    a 0/1 label in place of P leaves the expectation alone. Calandriello et al. 2024,
    arXiv:2403.08635, eq. 6 (up to a constant); Zhou et al. 2025, arXiv:2503.08942.
    """
    check_same_shape(
        policy_first_logps=policy_first_logps,
        policy_second_logps=policy_second_logps,
        reference_first_logps=reference_first_logps,
        reference_second_logps=reference_second_logps,
        preference_gap=preference_gap,
    )
    first = policy_first_logps - reference_first_logps.detach()
    second = policy_second_logps - reference_second_logps.detach()
    return (first - second - preference_gap / beta) ** 2


class OnlineIPO(Objective):
    """Online IPO (Calandriello et al. 2024, arXiv:2403.08635): its stationary point is the
    equilibrium at `beta`.
    """

    paper: ClassVar[str] = "Calandriello et al. 2024, arXiv:2403.08635"
    equation: ClassVar[str] = (
        "L = (log pi/ref(y) - log pi/ref(y') - (P(y > y') - 1/2) / beta)^2, y, y' ~ pi"
    )

    beta: PositiveFloat = Field(
        0.1, description="strength of the reverse KL to the reference, per completion (mean: token)"
    )
    form: Literal["sum", "mean"] = Field(
        "sum", description="a completion's log-prob: its tokens' sum, or mean (another game)"
    )

    @property
    def plan(self) -> Plan:
        return Plan("game", samples=(Draw(2),), feedback="pairwise")

    @classmethod
    def examples(cls) -> list[Objective]:
        return [cls(), cls(form="mean")]

    def gap(self, batch: GameBatch) -> Tensor:
        """How much more often the first sample wins than the second [B]."""
        return batch.preference[:, 0] - 0.5

    def anchor(self, tokens: TokenLogps) -> Tensor:
        """Log-probs of what the policy is held to [B]."""
        return self.reduced(tokens, "reference")

    @property
    def temperature(self) -> float:
        """What the preference gap is divided by."""
        return self.beta

    def reduced(self, tokens: TokenLogps, name: str) -> Tensor:
        """A completion's log-prob [B] in this objective's form."""
        total = tokens.sequence(name)
        return total if self.form == "sum" else total / tokens.lengths.clamp(min=1)

    def loss(self, batch: GameBatch) -> LossTerms:
        first, second = batch.completions
        policy = (self.reduced(first, "policy"), self.reduced(second, "policy"))
        anchor = (self.anchor(first), self.anchor(second))
        losses = online_ipo_loss(*policy, *anchor, self.gap(batch), beta=self.temperature)

        ratios = [t.sequence().detach() - t.sequence("reference") for t in (first, second)]
        metrics = {
            "rewards/margins": self.beta * (ratios[0] - ratios[1]),
            "rewards/probabilities": batch.preference[:, 0],
        }
        # Samples of a mixture say nothing about the policy's own KL.
        if all(set(draw.models) == {"policy"} for draw in self.plan.samples if draw.scored):
            metrics["kl"] = (ratios[0] + ratios[1]) / 2
        return LossTerms([Term("online_ipo", losses)], metrics)
