"""KTO: learning from unpaired completions labelled desirable or undesirable."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import LabelledBatch, LossTerms, Plan, Term
from alignkit.objectives.base import Objective
from alignkit.tensors import check_same_shape


def kto_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    labels: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO loss per completion: [B] x 3, [] -> [B]. `labels` is True for desirable; `baseline` (z0)
    estimates the KL of policy and reference from completions of other prompts, without a gradient.

    Ethayarajh et al. 2024, arXiv:2402.01306, in the form weight * (1 - value).
    """
    check_same_shape(policy_logps=policy_logps, reference_logps=reference_logps, labels=labels)
    advantage = policy_logps - reference_logps.detach() - baseline.detach()
    sign = torch.where(labels, 1.0, -1.0).to(advantage.dtype)
    weight = torch.where(labels, desirable_weight, undesirable_weight).to(advantage.dtype)
    return weight * (-beta * sign * advantage).sigmoid()


class KTO(Objective):
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306), or APO-zero on unpaired completions
    (D'Oosterlinck et al. 2024, arXiv:2408.06266), which is KTO without a baseline.
    """

    paper: ClassVar[str] = "Ethayarajh et al. 2024, arXiv:2402.01306"
    equation: ClassVar[str] = (
        "L = weight * sigmoid(-/+ beta * [log pi(y)/ref(y) - z0]), z0 = max(0, mean over mismatched "
        "pairs), or 0 in form apo_zero_unpaired"
    )

    beta: PositiveFloat = Field(
        0.1, description="scale of the log-ratio; larger stays closer to the reference"
    )
    desirable_weight: PositiveFloat = Field(1.0, description="weight of desirable completions")
    undesirable_weight: PositiveFloat = Field(1.0, description="weight of undesirable completions")

    form: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto", description="apo_zero_unpaired: no baseline z0, so each completion counts by itself"
    )

    @property
    def plan(self) -> Plan:
        if self.form == "apo_zero_unpaired":
            return Plan("labelled")
        return Plan("labelled", coupled=True, mismatched=True)

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(form="apo_zero_unpaired")]

    def loss(self, batch: LabelledBatch) -> LossTerms:
        policy = batch.tokens.sequence()
        reference = batch.tokens.sequence("reference")
        baseline = self._baseline(batch)
        losses = kto_loss(
            policy,
            reference,
            batch.labels,
            baseline,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )

        rewards = self.beta * (policy - reference).detach()
        metrics = {
            "rewards/chosen": rewards[batch.labels],
            "rewards/rejected": rewards[~batch.labels],
            "logps/chosen": policy.detach()[batch.labels],
            "logps/rejected": policy.detach()[~batch.labels],
            "kl": baseline,
        }
        return LossTerms([Term("kto", losses)], metrics)

    @staticmethod
    def _baseline(batch: LabelledBatch) -> Tensor:
        """z0 over the whole step; 0, the least it can be, without mismatched pairs: in a step of one
        row, and in form apo_zero_unpaired.
        """
        if batch.mismatched is None:
            return batch.tokens.policy.new_zeros(())
        ratios = batch.mismatched.sequence() - batch.mismatched.sequence("reference")
        return ratios.mean().clamp(min=0).detach()
