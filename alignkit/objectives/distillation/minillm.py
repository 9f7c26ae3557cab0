"""MiniLLM: the full gradient of the reverse KL to the teacher."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from alignkit.batches import LossTerms, Plan, RolloutBatch
from alignkit.credit import Baseline, group_baseline
from alignkit.kl import Direction, importance
from alignkit.objectives.base import Objective, State
from alignkit.objectives.distillation.teacher_base import KL_METRICS, teacher_statistic
from alignkit.objectives.rollout_base import Credit, RolloutObjective, advantages_of, ratio_metrics
from alignkit.objectives.surrogates import ppo_loss
from alignkit.objectives.teacher_losses import minillm_advantages


class MiniLLM(RolloutObjective):
    """MiniLLM (Gu et al. 2024, arXiv:2306.08543) without its tricks: the exact KL at each token plus
    a policy gradient for the divergence that comes after it.

    The paper's mixture of teacher and policy as a sampler, whose token weights are biased, is left
    out; its baseline is whitening, here it is the group's other completions.
    """

    paper: ClassVar[str] = "Gu et al. 2024, arXiv:2306.08543, eq. 5 and 6"
    equation: ClassVar[str] = (
        "L = KL(pi_t || teacher_t) - w_t SG(sum_{s > t} log teacher_s - log pi_s) per token"
    )
    favours_better: ClassVar = "no preference"

    single_step: bool = Field(
        True, description="exact KL of each token; false: sampled, as part of its reward"
    )
    gamma: Annotated[float, Field(ge=0, le=1)] = Field(1.0, description="discount; exact at 1")
    length_normalised: bool = Field(
        False, description="reward over remaining tokens, not the gradient of a KL any more"
    )
    baseline: Baseline = Field("leave_one_out", description="from the prompt's other completions")

    @model_validator(mode="after")
    def _normalised_rewards_contain_their_own_token(self) -> Self:
        if self.length_normalised and self.single_step:
            raise ValueError(
                "length_normalised needs single_step: false: it divides the whole reward"
            )
        return self

    @property
    def plan(self) -> Plan:
        statistics = {"kl": teacher_statistic(divergence="reverse_kl")} if self.single_step else {}
        return self.rollout_plan(statistics=statistics, anchors=("teacher",), scored=False)

    @property
    def kl_gradient(self) -> tuple[Credit, Direction] | None:
        """Of the KL to the teacher."""
        exact = self.gamma == 1 and not self.length_normalised and self.baseline != "mean"
        return ("sequence", "reverse") if exact else None

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        sampled = cls(single_step=False)
        return [cls(), sampled, cls(single_step=False, length_normalised=True, gamma=0.9)]

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """What the teacher gives the tokens after each one, minus the baseline."""
        tokens = rollout.tokens
        teacher = tokens.anchors["teacher"]
        normalised = self.length_normalised
        gain = minillm_advantages(
            tokens.policy, teacher, tokens.mask, gamma=self.gamma, length_normalised=normalised
        )
        if self.single_step:  # the token's own part is the exact KL
            gain = gain - (teacher - tokens.policy)
        gain = gain - group_baseline(gain, rollout.groups, kind=self.baseline)
        return replace(rollout, advantages=gain.where(tokens.mask, gain.new_zeros(()))), state

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        old = tokens.get("behavior")
        terms = [self.term("policy", ppo_loss(tokens.policy, old, advantages_of(batch)), tokens)]
        metrics = ratio_metrics(tokens, importance(tokens.policy, old))
        if self.single_step:
            terms.append(self.term("kl", tokens.extras["kl"], tokens))
            metrics[KL_METRICS["reverse_kl"]] = tokens.extras["kl"].detach()[tokens.mask]
        return LossTerms(terms, metrics)
