"""DPH-RL: policy gradient where there is something to find, rehearsal where there is something to
keep.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from alignkit import divergences
from alignkit.batches import Draw, LossTerms, Plan, RolloutBatch
from alignkit.credit import group_advantages, group_baseline
from alignkit.kl import importance
from alignkit.objectives.base import Objective, State
from alignkit.objectives.rollout_base import GroupObjective, advantages_of, spread
from alignkit.objectives.surrogates import ppo_loss
from alignkit.objectives.teacher_losses import dph_loss


class DPH(GroupObjective):
    """Diversity-preserving RL (DPH-RL, arXiv:2509.07430): GRPO without a KL, and a mass-covering
    divergence on answers that the reference gave once and that are kept for the whole run.

    The paper tells two kinds of prompts apart; `solved` does so by the reference's own scores.
    """

    paper: ClassVar[str] = "DPH-RL, arXiv:2509.07430, eq. 5 and 6"
    equation: ClassVar[str] = (
        "L = -clip(w) A per own token; weight * f(pi/ref) per token of the reference's answers"
    )

    divergence: Literal["forward_ukl", "jensen_shannon", "alpha"] = Field(
        "forward_ukl", description="forward_ukl: the sum over tokens is KL(reference || policy)"
    )
    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="of divergence alpha")
    weight: NonNegativeFloat = Field(0.02, description="of the divergence on the kept answers")
    stored: PositiveInt = Field(1, description="answers of the reference kept for each prompt")
    solved: float | None = Field(
        None,
        description="mean score of the kept answers from which on a prompt is rehearsed alone; "
        "below it is explored alone; null = every prompt is both",
    )

    @property
    def plan(self) -> Plan:
        rehearsal = Draw(self.stored, source="reference", once=True)
        return self.rollout_plan(samples=(Draw(), rehearsal))

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        js = cls(divergence="jensen_shannon", weight=0.2, solved=-0.5, aggregation="sequence_sum")
        return [cls(), js, cls(divergence="alpha", weight=0.5, stored=2)]

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """GRPO's advantages of the policy's own completions; 0 for the kept answers."""
        own = ~rollout.drawn_by(1)
        advantages = torch.zeros_like(rollout.scores)
        advantages[own] = group_advantages(
            rollout.scores[own],
            rollout.groups[own],
            kind="mean",
            scale=self.scale_by_std,
            risk=self.risk,
        )
        return replace(rollout, advantages=spread(advantages, rollout.tokens)), state

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        old = tokens.get("behavior")
        stored = batch.drawn_by(1)
        solved = self._solved(batch, stored)
        both = self.solved is None
        explored = (~stored & (both | ~solved)).unsqueeze(-1)
        rehearsed = (stored & solved).unsqueeze(-1)

        gain = ppo_loss(tokens.policy, old, advantages_of(batch), **self.clip)
        parameters = {"alpha": self.alpha} if self.divergence == "alpha" else {}
        chosen = divergences.get(self.divergence, **parameters)
        drift = dph_loss(tokens.policy, tokens.reference, divergence=chosen)
        terms = [
            self.term("policy", gain.where(explored, 0.0), tokens),
            self.term("rehearsal", drift.where(rehearsed, 0.0), tokens, weight=self.weight),
        ]

        metrics = self.metrics(
            tokens.select((~stored).nonzero()[:, 0]),
            importance(tokens.policy, old)[~stored],
            advantages_of(batch)[~stored],
        )
        metrics["rehearsal"] = drift.detach()[tokens.mask & rehearsed]
        metrics["rehearsed"] = solved[stored].to(drift.dtype)
        return LossTerms(terms, metrics)

    def _solved(self, batch: RolloutBatch, stored: Tensor) -> Tensor:
        """Whether the kept answers of a completion's prompt score well enough: [N] bool."""
        if self.solved is None:
            return torch.ones_like(stored)
        total, number = (
            group_baseline(values.double(), batch.groups)
            for values in (batch.scores.where(stored, 0.0), stored)
        )
        return (number > 0) & (total >= self.solved * number)
