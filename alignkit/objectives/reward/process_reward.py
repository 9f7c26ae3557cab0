"""Process rewards: whether a solution is right so far, learned step by step."""

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.batches import LossTerms, Plan, ScoredBatch, Term
from alignkit.errors import ShapeError
from alignkit.objectives.base import Objective
from alignkit.tensors import check_same_shape


def step_loss(rewards: Tensor, labels: Tensor) -> Tensor:
    """-log P(label) under P(true) = sigmoid(reward): [N], bool [N] -> [N].

    Lightman et al. 2023, arXiv:2305.20050; with two logits for a step their difference is the reward.
    """
    check_same_shape(rewards=rewards, labels=labels)
    return -logsigmoid((2 * labels.to(rewards.dtype) - 1) * rewards)


class ProcessReward(Objective):
    """A reward for every step of a solution (Lightman et al. 2023, arXiv:2305.20050).

    A row is a step behind the prompt and the steps before it, labelled right or wrong; the reward is
    the log-odds that it is right, read at the step's last token.
    """

    paper: ClassVar[str] = "Lightman et al. 2023, arXiv:2305.20050"
    equation: ClassVar[str] = "L = -log sigmoid(r(x, y_<=k)) where step k is right, else of -r"

    @property
    def plan(self) -> Plan:
        return Plan("labelled", anchors=(), outputs=1)

    def loss(self, batch: ScoredBatch) -> LossTerms:
        if batch.labels is None:
            raise ShapeError("process_reward: the steps have no labels")
        rewards = batch.outputs[:, 0]
        seen = rewards.detach()
        metrics = {
            "rewards/chosen": seen[batch.labels],
            "rewards/rejected": seen[~batch.labels],
            "rewards/accuracies": ((seen > 0) == batch.labels).to(seen.dtype),
        }
        return LossTerms([Term("process_reward", step_loss(rewards, batch.labels))], metrics)
