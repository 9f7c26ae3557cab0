"""D2O: away from dispreferred responses, measured against the model's own, without preferred ones."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.batches import Draw, LossTerms, PairBatch, Plan
from alignkit.objectives.base import Objective, PairObjective
from alignkit.tensors import check_same_shape


def d2o_loss(
    own_log_ratios: Tensor, rejected_log_ratios: Tensor, *, alpha: float, beta: float
) -> Tensor:
    """-log sigmoid(beta * mean of the K own responses' log pi/ref - alpha * the rejected one's):
    [B, K], [B] -> [B].

    With K = 1 and alpha = beta it is DPO. Duan et al. 2024, arXiv:2403.03419, eq. 3.
    """
    own = own_log_ratios.mean(-1)
    check_same_shape(own_log_ratios=own, rejected_log_ratios=rejected_log_ratios)
    return -logsigmoid(beta * own - alpha * rejected_log_ratios)


class D2O(PairObjective):
    """Distributional dispreference optimisation (Duan et al. 2024, arXiv:2403.03419). Of a pair
    only the rejected response is used; the others are the model's own, drawn in every step. Both
    references of the paper are the one here.
    """

    paper: ClassVar[str] = "Duan et al. 2024, arXiv:2403.03419, eq. 3"
    equation: ClassVar[str] = (
        "L = -log sigmoid(beta/K sum_i log pi(y_i)/ref(y_i) - alpha log pi(l)/ref(l))"
    )

    alpha: PositiveFloat = Field(0.1, description="scale of the rejected response's log-ratio")
    beta: PositiveFloat = Field(0.1, description="scale of the own responses' mean log-ratio")
    samples: PositiveInt = Field(11, description="K, own responses per prompt")
    source: Literal["reference", "policy"] = Field("reference", description="whose they are")

    @property
    def plan(self) -> Plan:
        return Plan("pair", samples=(Draw(self.samples, self.source),))

    def loss(self, batch: PairBatch) -> LossTerms:
        rejected = batch.rejected.sequence() - batch.rejected.sequence("reference").detach()
        if (
            batch.sampled is None
        ):  # held-out pairs: nothing is drawn, the own responses count as unchanged
            own = rejected.new_zeros(len(rejected), 1)
        else:
            ratios = batch.sampled.sequence() - batch.sampled.sequence("reference").detach()
            own = ratios.view(-1, self.samples)
        losses = d2o_loss(own, rejected, alpha=self.alpha, beta=self.beta)
        return batch.rows("d2o", losses, rewards=(self.beta * own.mean(-1), self.alpha * rejected))

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(samples=3), cls(samples=2, alpha=0.5, source="policy")]
