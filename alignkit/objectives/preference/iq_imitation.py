"""IQ-imitation: maximum likelihood whose logits are soft action values, held to small rewards."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, NonNegativeFloat
from torch import Tensor
from torch.nn.functional import pad

from alignkit.batches import LossTerms, PairBatch, SequenceBatch, Term
from alignkit.objectives.base import Objective, SequenceObjective
from alignkit.objectives.preference.sft import sft_loss
from alignkit.plan import Plan
from alignkit.tensors import check_same_shape


def iq_rewards(
    policy_logps: Tensor, log_partition: Tensor, mask: Tensor, *, gamma: float
) -> Tensor:
    """The token rewards under which the policy is the soft optimum: r_t = Q_t - gamma V_{t+1} with
    V_t the log-partition of the logits at t, 0 after the end, and Q_t = log pi(y_t) + V_t the logit:
    [B, T] x 3 -> [B, T], 0 outside the mask. A run of the model's own tokens ends where a foreign one
    follows.

    They are known up to a shaping term c(s_t) - gamma c(s_{t+1}), which no likelihood can tell.

    >>> iq_rewards(torch.tensor([[-1.0, -2.0]]), torch.tensor([[3.0, 5.0]]),
    ...            torch.tensor([[True, True]]), gamma=1.0)
    tensor([[-3.,  3.]])
    """
    check_same_shape(policy_logps=policy_logps, log_partition=log_partition, mask=mask)
    nothing = policy_logps.new_zeros(())
    values = log_partition.where(mask, nothing)
    following = pad(values[..., 1:], (0, 1))
    return (policy_logps + values - gamma * following).where(mask, nothing)


def discounts(mask: Tensor, gamma: float) -> Tensor:
    """gamma^t, with t the number of own tokens before: [B, T] -> [B, T]."""
    return gamma ** (mask.cumsum(-1) - 1).clamp(min=0)


class IQImitation(SequenceObjective):
    """IQ-imitation on data alone (Wulfmeier et al. 2024): the inverse soft-Q objective is likelihood
    plus a penalty on the squared rewards that its logits stand for.

    The weight of the penalty is ours to choose: the paper's value was not at hand. `extracted_reward`
    in the metrics is the mean token reward.
    """

    paper: ClassVar[str] = "Wulfmeier et al. 2024, arXiv:2409.01369"
    equation: ClassVar[str] = (
        "L = sum_t gamma^t (-log pi(y_t) + lam (log pi(y_t) + V_t - gamma V_t+1)^2)"
    )

    gamma: float = Field(1.0, gt=0, le=1, description="discount of later tokens")
    lam: NonNegativeFloat = Field(
        0.01, description="weight of the squared token rewards; 0 is maximum likelihood"
    )

    @property
    def plan(self) -> Plan:
        return Plan("sequence", anchors=(), partition=True)

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(gamma=0.9), cls(lam=0.0)]

    def loss(self, batch: SequenceBatch | PairBatch) -> LossTerms:
        tokens = batch.chosen if isinstance(batch, PairBatch) else batch.tokens
        mask = tokens.mask
        nll = sft_loss(tokens.policy, mask)
        rewards = iq_rewards(tokens.policy, tokens.extras["log_partition"], mask, gamma=self.gamma)

        weights = discounts(mask, self.gamma)
        terms = [Term("nll", weights * nll, unit="tokens")]
        if self.lam > 0:
            terms.append(Term("rewards", weights * rewards**2, unit="tokens", weight=self.lam))
        shown = {"nll": nll.detach()[mask], "extracted_reward": rewards.detach()[mask]}
        return LossTerms(terms, shown)
