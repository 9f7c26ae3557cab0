"""On-policy distillation by sampled tokens: the teacher's log-prob of each token is its reward."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from alignkit.batches import LossTerms, Plan, RolloutBatch
from alignkit.kl import Direction, importance
from alignkit.objectives.base import Objective
from alignkit.objectives.rollout_base import ClippedObjective, ClipWidth, Credit
from alignkit.objectives.teacher_losses import opd_loss
from alignkit.tensors import masked_sum


class OPD(ClippedObjective):
    """On-policy distillation (Lu et al. 2025, Thinking Machines): a policy gradient with the
    advantage log teacher - log sampler of each token, for teachers that give no more than that.

    `distill` with the reverse KL on own samples has the same expected gradient and less noise.
    """

    paper: ClassVar[str] = "Lu et al. 2025, On-policy distillation, Thinking Machines"
    equation: ClassVar[str] = "L = -w_t SG(log teacher_t - log pi_old_t) per token, w = pi/pi_old"
    favours_better: ClassVar = "no preference"

    clip_low: ClipWidth | None = Field(
        None, description="no gain from a ratio below 1 - this; null = off"
    )
    clip_high: ClipWidth | None = Field(
        None, description="no gain from a ratio above 1 + this; null = off"
    )

    @property
    def plan(self) -> Plan:
        return self.rollout_plan(anchors=("teacher",), scored=False)

    @property
    def kl_gradient(self) -> tuple[Credit, Direction] | None:
        """Of the KL to the teacher."""
        return "token", "reverse"

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(clip_low=0.5, clip_high=0.9, aggregation="constant", length=4)]

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        old = tokens.get("behavior")
        teacher = tokens.anchors["teacher"]
        values = opd_loss(tokens.policy, old, teacher, **self.clip)

        # The sampled KL of whole completions; on a batch it may be below 0.
        metrics = self.metrics(tokens, importance(tokens.policy, old), teacher - old)
        metrics["kl/behavior_teacher_k1"] = masked_sum(old - teacher, tokens.mask)
        return LossTerms([self.term("opd", values, tokens)], metrics)
