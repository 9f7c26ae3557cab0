"""Knowledge distillation: the policy's next-token laws are moved towards a teacher's."""

from collections.abc import Sequence
from typing import ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor

from alignkit.batches import LossTerms, Plan, RolloutBatch, SequenceBatch, Term
from alignkit.kl import Direction
from alignkit.objectives.base import Objective
from alignkit.objectives.distillation.own_answers import OwnAnswersObjective, Share
from alignkit.objectives.preference.sft import sft_loss
from alignkit.objectives.rollout_base import Credit


class Distill(OwnAnswersObjective):
    """Distillation by a divergence of whole next-token laws (Agarwal et al. 2024,
    arXiv:2306.13649): on given answers, on the policy's own samples, or on some of each.

    On own samples the gradient is the partial one: a token gets no credit for the divergence that
    comes after it.
    """

    paper: ClassVar[str] = "Agarwal et al. 2024, arXiv:2306.13649, eq. 2 and algorithm 1"
    equation: ClassVar[str] = (
        "L = sum_t (1 - kd_ratio) (-log pi(y_t)) + kd_ratio D(teacher_t, pi_t) / tokens"
    )

    kd_ratio: Share = Field(
        1.0, description="weight of the divergence; the rest is the given answers' likelihood"
    )

    @model_validator(mode="after")
    def _likelihood_needs_given_answers(self) -> Self:
        if self.share == 1 and self.kd_ratio < 1:
            raise ValueError("kd_ratio below 1 needs given answers; with share 1 there are none")
        return self

    @property
    def plan(self) -> Plan:
        statistics = {"divergence": self.statistic}
        if self.share == 1:
            return Plan("rollout", statistics, ("teacher",), self.own_answers)
        return Plan("sequence", statistics, ("teacher",), self.own_answers)

    @property
    def kl_gradient(self) -> tuple[Credit, Direction] | None:
        """Of the KL to the teacher, on own samples."""
        own = self.share == 1 and self.teacher_top is None
        own = own and self.divergence == "reverse_kl" and self.temperature == 1
        return ("token", "reverse") if own else None

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        own = [
            cls(divergence="reverse_kl", share=1.0),
            cls(divergence="akl", mu=0.7, share=1.0, teacher_top=3),
        ]
        skewed = [cls(divergence=name, alpha=0.2) for name in ("skew_kl", "skew_reverse_kl")]
        varied = cls(divergence="jsd", beta=0.3, kd_ratio=0.7, share=0.5, temperature=2.0)
        adaptive = cls(divergence="skew_kl", share_growth=0.1, replay=1000)
        return [cls(), varied, *own, *skewed, adaptive, cls(divergence="total_variation")]

    @classmethod
    def limits(cls) -> Sequence[tuple[Objective, Objective]]:
        skew = cls(divergence="skew_reverse_kl", alpha=0.0)
        return [(skew, cls(divergence="reverse_kl")), (cls(divergence="akl", mu=1.0), cls())]

    def loss(self, batch: SequenceBatch | RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        divergence = tokens.extras["divergence"]
        terms = [Term("distill", divergence, "tokens", self.kd_ratio)]
        metrics = {self.metric: divergence.detach()[tokens.mask]}

        if self.kd_ratio < 1:
            given = tokens.mask
            if batch.draws is not None:
                given = given & (batch.draws < 0).unsqueeze(-1)
            terms.append(Term("sft", sft_loss(tokens.policy, given), "tokens", 1 - self.kd_ratio))
        return LossTerms(terms, metrics)

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """The teacher (`reference`), whatever the reward. None is claimed for the total variation,
        whose gradient does not shrink on the way there.
        """
        smooth = self.divergence != "total_variation"
        return reference if self.kd_ratio == 1 and smooth else None
