"""RAFT: likelihood of the best samples of each prompt, with a KL that keeps the others alive."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from alignkit.batches import LossTerms, Plan, RolloutBatch
from alignkit.objectives.base import Objective, State, forward_kl
from alignkit.objectives.rollout_base import (
    Aggregation,
    RolloutObjective,
    advantages_of,
    spread,
)


def kept_shares(scores: Tensor, groups: Tensor, keep: int) -> Tensor:
    """How much of each completion is kept: [N], [N] -> [N] in [0, 1].

    1 for the `keep` best of a group, 0 for the others; completions that tie at the edge share what
    is left evenly. 0 in groups of `keep` completions or fewer, where nothing is chosen.
    """
    same = groups.unsqueeze(0) == groups.unsqueeze(1)
    better = (same & (scores.unsqueeze(0) > scores.unsqueeze(1))).sum(-1)
    tied = (same & (scores.unsqueeze(0) == scores.unsqueeze(1))).sum(-1)
    shares = ((keep - better) / tied).clamp(0, 1)
    return shares.where(same.sum(-1) > keep, shares.new_zeros(()))


class RAFT(RolloutObjective):
    """Reward-ranked fine-tuning (Dong et al. 2023, arXiv:2304.06767), with SuperHF's KL term
    (Mukobi et al. 2023, arXiv:2310.16763).

    The samples that were kept are demonstrations: the gradient goes through their log-probs and
    through the KL alone. Without the KL, rounds of it collapse onto the best completion.
    """

    paper: ClassVar[str] = (
        "Dong et al. 2023, arXiv:2304.06767; Mukobi et al. 2023, arXiv:2310.16763"
    )
    equation: ClassVar[str] = (
        "L = -log pi(y), y among the best `keep` of a prompt; + beta KL(ref || pi) per token"
    )

    credit_reads_policy: ClassVar[bool] = False

    beta: NonNegativeFloat = Field(
        0.1, description="forward KL, KL(reference || policy), exact at every sampled prefix"
    )
    keep: PositiveInt = Field(1, description="completions of each prompt that are learned from")
    threshold: float | None = Field(
        None, description="completions with a score that is not above this are never kept"
    )
    aggregation: Aggregation = Field(
        "sequence_sum", description="how token losses become one number: what lengths weigh"
    )

    @property
    def plan(self) -> Plan:
        return self.rollout_plan(statistics={"forward_kl": forward_kl})

    @property
    def surrogate(self) -> bool:
        return True

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [
            cls(),
            cls(keep=2, aggregation="token_mean", threshold=0.2),
            cls(aggregation="constant", length=4),
        ]

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """The share of each completion that is kept, scaled so that their mean is over those kept."""
        same = rollout.groups.unsqueeze(0) == rollout.groups.unsqueeze(1)
        shares = kept_shares(rollout.scores, rollout.groups, self.keep)
        if self.threshold is not None:
            shares = shares.where(rollout.scores > self.threshold, 0.0)
        weights = shares * same.sum(-1) / self.keep
        return replace(rollout, advantages=spread(weights, rollout.tokens)), state

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        weights = advantages_of(batch).detach()
        divergence = tokens.extras["forward_kl"]
        terms = [
            self.term("raft", -weights * tokens.policy, tokens),
            self.term("kl", divergence, tokens, weight=self.beta),
        ]
        metrics = {"kl/reference_policy_exact": tokens.sequence("forward_kl").detach()}
        return LossTerms(terms, metrics)
