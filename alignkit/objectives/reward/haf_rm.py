"""HAF-RM: a reward head and the language model under it learn from the same pairs."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, PairBatch, Plan
from alignkit.objectives.base import Objective, PairObjective
from alignkit.objectives.preference.dpo import DPO, dpo_loss
from alignkit.objectives.reward.reward_model import plackett_luce_loss
from alignkit.tensors import check_same_shape, last_value


def haf_rm_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, policy_losses: Tensor, *, share: float
) -> Tensor:
    """(1 - share) * Bradley-Terry of the two rewards + share * the policy's loss: [B] x 3 -> [B].

    At either end the other part is left out. Source: Liu et al. 2024, arXiv:2407.04185, whose
    weight of the policy's loss is share / (1 - share).
    """
    check_same_shape(chosen=chosen_rewards, rejected=rejected_rewards, policy=policy_losses)
    rewards = torch.stack([chosen_rewards, rejected_rewards], -1)
    ranking = plackett_luce_loss(rewards, torch.ones_like(rewards, dtype=torch.bool))
    return (1 - share) * ranking + share * policy_losses


class HAFRM(PairObjective):
    """Hybrid alignment of a reward model (Liu et al. 2024, arXiv:2407.04185).

    The reward of a completion is what the value head says where its last token, the end token, is
    predicted; the head has then read the whole text. The policy's DPO loss keeps the states below
    it those of a language model. `optimum` is the policy's.
    """

    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2407.04185"
    equation: ClassVar[str] = (
        "L = -(1 - share) * log sigmoid(r(w) - r(l)) + share * DPO(w, l), r read at the end token"
    )

    beta: PositiveFloat = Field(0.1, description="strength of the KL in the policy's part (DPO)")
    share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="the policy's share of the loss: 0 is a reward model alone, 1 is DPO"
    )

    @property
    def plan(self) -> Plan:
        return Plan("pair", values=True, rewards=True)

    def loss(self, batch: PairBatch) -> LossTerms:
        chosen = last_value(batch.chosen.get("values"), batch.chosen.mask)
        rejected = last_value(batch.rejected.get("values"), batch.rejected.mask)
        policy = dpo_loss(*batch.sequence_logps(), beta=self.beta)
        losses = haf_rm_loss(chosen, rejected, policy, share=self.share)
        return batch.rows("haf_rm", losses, rewards=(chosen, rejected))

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """DPO's, for every share of it; none where it has no share."""
        return DPO(beta=self.beta).optimum(reward, reference) if self.share else None

    def backup(self, values: Tensor, reference: Tensor) -> Tensor | None:
        """DPO's."""
        return DPO(beta=self.beta).backup(values, reference) if self.share else None

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(beta=0.5, share=0.8)]

    @classmethod
    def limits(cls) -> Sequence[tuple[Objective, Objective]]:
        return [(cls(beta=0.3, share=1.0), DPO(beta=0.3))]
