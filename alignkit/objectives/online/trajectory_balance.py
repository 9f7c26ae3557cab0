"""Trajectory balance: squared error of the log-ratio that the tilted optimum would have."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, RolloutBatch
from alignkit.credit import group_baseline
from alignkit.kl import Direction, importance
from alignkit.objectives.base import Objective, tilted
from alignkit.objectives.rollout_base import Credit, RolloutObjective, ratio_metrics
from alignkit.objectives.teacher_losses import trajectory_balance_loss


class TrajectoryBalance(RolloutObjective):
    """Trajectory balance (Malkin et al. 2022, arXiv:2201.13259) with the group's estimate of Z (the
    log-variance of Richter et al. 2020): 0 for all completions of a prompt exactly at the optimum,
    whoever sampled them.
    """

    paper: ClassVar[str] = "Malkin et al. 2022, arXiv:2201.13259; Hu et al. 2024, arXiv:2310.04363"
    equation: ClassVar[str] = (
        "L = (log Z + log pi - log ref - score / beta)^2, log Z = SG(the group's mean of the rest)"
    )

    beta: PositiveFloat = Field(0.5, description="strength of the reverse KL to the reference")

    @property
    def kl_gradient(self) -> tuple[Credit, Direction] | None:
        return "sequence", "reverse"

    @property
    def surrogate(self) -> bool:
        return True

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(beta=2.0)]

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        policy = tokens.sequence()
        reference = tokens.sequence("reference")
        scores = batch.scores.to(policy.dtype)

        # Constant in the gradient, so that it is the gradient of the group's variance.
        log_z = group_baseline(reference + scores / self.beta - policy.detach(), batch.groups)
        values = trajectory_balance_loss(policy, reference, scores, log_z, beta=self.beta)
        ratio = importance(tokens.policy, tokens.get("behavior"))
        return LossTerms(
            [self.term("trajectory_balance", values, tokens)],
            ratio_metrics(tokens, ratio),
        )

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """ref * exp(reward / beta), normalised."""
        return tilted(reward, reference, self.beta)
