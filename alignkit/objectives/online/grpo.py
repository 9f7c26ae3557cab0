"""Group-relative policy optimisation."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, NonNegativeFloat
from torch import Tensor

from alignkit.batches import LossTerms, Plan, RolloutBatch
from alignkit.kl import LOSS_ESTIMATORS, Direction
from alignkit.objectives.base import Objective
from alignkit.objectives.ratios import RatioGroup
from alignkit.objectives.rollout_base import Aggregation, Credit, DualClip
from alignkit.objectives.surrogates import KLEstimator, grpo_loss
from alignkit.tensors import masked_sum


class GRPO(RatioGroup):
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
        return self.exploring_plan(("reference",) if self.beta else ())

    @property
    def kl_gradient(self) -> tuple[Credit, Direction] | None:
        if not self.beta or self.entropy_weight:  # with the entropy's gradient it is neither
            return None
        if self.ratio == "sequence" and self.kl in ("k1_weighted", "k3_weighted"):
            return None  # the weight's gradient is shared by all tokens
        return "token", LOSS_ESTIMATORS[self.kl][1]

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
            cls(entropy_weight=0.1, off_policy_threshold=0.3),
            cls(ratio="sequence", aggregation="token_mean"),
            cls(beta=0, scale_by_std=False, aggregation="constant", length=4, **wide),
        ]

    def kl_weight(self, batch: RolloutBatch) -> float | Tensor:
        """Strength of the KL: one number, or one per token [N, T]."""
        return self.beta

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        logps = tokens.policy
        old = tokens.get("behavior")
        reference = tokens.reference if self.beta else logps
        advantages, masked = self.teaching_advantages(batch)
        values = grpo_loss(
            logps,
            old,
            reference,
            advantages,
            beta=self.kl_weight(batch),
            kl=self.kl,
            dual_clip=self.dual_clip,
            mask=self.ratio_mask(tokens),
            **self.clip,
        )

        metrics = {**self.metrics(tokens, *self.ratios(batch)), **masked}
        if self.beta:
            penalty = LOSS_ESTIMATORS[self.kl][0](logps - reference, logps - old).detach()
            metrics[f"kl/policy_reference_{self.kl}"] = masked_sum(penalty, tokens.mask)
        return LossTerms([self.term("grpo", values, tokens), *self.entropy_terms(tokens)], metrics)
