"""Group-relative policy optimisation."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat
from torch import Tensor

from alignkit.batches import LossTerms, Plan, RolloutBatch
from alignkit.kl import LOSS_ESTIMATORS, Direction, importance
from alignkit.objectives.base import Objective, State
from alignkit.objectives.rollout_base import (
    Aggregation,
    ClippedObjective,
    Credit,
    DualClip,
    filled,
    grouped,
    ratio_metrics,
)
from alignkit.objectives.surrogates import ppo_loss
from alignkit.tensors import check_same_shape, masked_sum

KLEstimator = Literal["k2", "k3", "k3_stopped", "k1_weighted", "k3_weighted", "k3_straight_through"]


def grpo_loss(
    policy_logps: Tensor,
    behavior_logps: Tensor,
    reference_logps: Tensor,
    advantages: Tensor,
    *,
    beta: float,
    kl: KLEstimator = "k3_weighted",
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """Clipped surrogate + beta * KL estimate per token: [N, T] x 4 -> [N, T].

    What the penalty's gradient is depends on `kl` (`alignkit.kl`): k3, as published, is the forward
    KL's; k3_weighted the reverse KL's. Shao et al. 2024, arXiv:2402.03300, eq. 3; weighted:
    DeepSeek-V3.2, arXiv:2512.02556.
    """
    check_same_shape(policy_logps=policy_logps, reference_logps=reference_logps)
    surrogate = ppo_loss(
        policy_logps,
        behavior_logps,
        advantages,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    penalty = LOSS_ESTIMATORS[kl][0](
        policy_logps - reference_logps.detach(), policy_logps - behavior_logps.detach()
    )
    return surrogate + beta * penalty


class GRPO(ClippedObjective):
    """Group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300). No value head: the
    group is the baseline.
    """

    paper: ClassVar[str] = "Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4"
    equation: ClassVar[str] = (
        "L = max(-w A, -clip(w) A) + beta k(pi, ref) per token; A = (score - group mean) / group std"
    )

    beta: NonNegativeFloat = Field(
        0.04, description="strength of the KL to the reference, in the loss; 0 = no reference"
    )
    kl: KLEstimator = Field(
        "k3_weighted", description="gradient of the reverse KL; k3 and k3_stopped of the FORWARD KL"
    )
    scale_by_std: bool = Field(
        True, description="divide by the group's standard deviation; false = Dr. GRPO"
    )
    dual_clip: DualClip | None = Field(
        None, description="largest ratio that counts where the advantage is negative"
    )
    aggregation: Aggregation = Field(
        "sequence_mean", description="as published; token_mean: DAPO; constant: Dr. GRPO"
    )

    @property
    def plan(self) -> Plan:
        return self.rollout_plan(anchors=("reference",) if self.beta else ())

    @property
    def kl_gradient(self) -> tuple[Credit, Direction] | None:
        return ("token", LOSS_ESTIMATORS[self.kl][1]) if self.beta else None

    @property
    def surrogate(self) -> bool:
        return self.kl in ("k2", "k3_stopped", "k3_straight_through")

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        wide = {"clip_low": 0.6, "clip_high": 1.0, "dual_clip": 3.0}
        return [
            cls(),
            cls(kl="k3"),
            cls(kl="k2"),
            cls(beta=0, scale_by_std=False, aggregation="constant", length=4, **wide),
        ]

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """One advantage per completion from its group; exactly 0 in a group whose scores are all
        equal.
        """
        return grouped(rollout, scale=self.scale_by_std), state

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens, (advantages,) = batch.tokens, filled(batch, "advantages")
        logps = tokens.policy
        old = tokens.get("behavior")
        reference = tokens.reference if self.beta else tokens.policy
        values = grpo_loss(
            logps,
            old,
            reference,
            advantages,
            beta=self.beta,
            kl=self.kl,
            dual_clip=self.dual_clip,
            **self.clip,
        )
        metrics = ratio_metrics(tokens, importance(logps, old), *self.clip.values())
        if self.beta:
            penalty = LOSS_ESTIMATORS[self.kl][0](logps - reference, logps - old).detach()
            metrics[f"kl/policy_reference_{self.kl}"] = masked_sum(penalty, tokens.mask)
        return LossTerms([self.term("grpo", values, tokens)], metrics)
