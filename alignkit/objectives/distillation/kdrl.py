"""KDRL: a reward and a teacher at once, on the policy's own samples."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat

from alignkit.batches import LossTerms, Plan, RolloutBatch
from alignkit.credit import group_advantages
from alignkit.kl import Direction, importance
from alignkit.objectives.base import Objective, State
from alignkit.objectives.rollout_base import (
    Credit,
    RolloutObjective,
    advantages_of,
    ratio_metrics,
    spread,
)
from alignkit.objectives.teacher_losses import kdrl_loss
from alignkit.tensors import masked_sum


class KDRL(RolloutObjective):
    """Knowledge distillation and reinforcement learning in one (Xu et al. 2025, arXiv:2506.02208):
    GRPO's policy gradient plus the reverse KL to the teacher by k2, token by token.

    The paper lowers `kd_weight` during the run; here it stays.
    """

    paper: ClassVar[str] = "Xu et al. 2025, arXiv:2506.02208, eq. 8 and 9"
    equation: ClassVar[str] = (
        "L = -w A + kd_weight (log pi - log teacher)^2 / 2 per token; A = (score - mean) / std"
    )

    credit_reads_policy: ClassVar[bool] = False

    kd_weight: NonNegativeFloat = Field(2e-3, description="strength of the KL to the teacher")
    masking: Literal["none", "response"] = Field(
        "none", description="response: completions with a score above 0 are not distilled"
    )
    scale_by_std: bool = Field(True, description="divide by the group's standard deviation")

    @property
    def plan(self) -> Plan:
        return self.rollout_plan(anchors=("teacher",))

    @property
    def kl_gradient(self) -> tuple[Credit, Direction] | None:
        """Of the KL to the teacher; masked completions have none."""
        return ("token", "reverse") if self.masking == "none" and self.kd_weight else None

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(kd_weight=0.1), cls(kd_weight=0.2, masking="response", scale_by_std=False)]

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """One advantage per completion: its score minus the group's mean, with `scale_by_std` over
        the standard deviation.
        """
        advantages = group_advantages(
            rollout.scores, rollout.groups, kind="mean", scale=self.scale_by_std
        )
        return replace(rollout, advantages=spread(advantages, rollout.tokens)), state

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        old = tokens.get("behavior")
        teacher = tokens.anchors["teacher"]
        values = kdrl_loss(
            tokens.policy,
            old,
            teacher,
            advantages_of(batch),
            kd_weight=self.kd_weight,
            scores=batch.scores,
            masking=self.masking,
        )

        metrics = ratio_metrics(tokens, importance(tokens.policy, old))
        metrics["kl/behavior_teacher_k1"] = masked_sum(old - teacher, tokens.mask)
        return LossTerms([self.term("kdrl", values, tokens)], metrics)
