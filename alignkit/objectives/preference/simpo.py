"""SimPO: preference optimisation on length-normalised log-probs, without a reference."""

from typing import Annotated, ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.batches import LossTerms, PairBatch, Plan
from alignkit.objectives.preference.weighting import WeighablePairs
from alignkit.tensors import check_same_shape, masked_mean


def simpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    gamma: float = 0.0,
) -> Tensor:
    """SimPO loss per pair: [B] x 4 -> [B] from log-prob sums and lengths in tokens. `gamma` is the
    target margin itself; the paper's code calls gamma / beta `gamma_beta_ratio`.

    Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    chosen = policy_chosen_logps / chosen_lengths.clamp(min=1)
    rejected = policy_rejected_logps / rejected_lengths.clamp(min=1)
    return -logsigmoid(beta * (chosen - rejected) - gamma)


class SimPO(WeighablePairs):
    """SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6)."""

    paper: ClassVar[str] = "Meng et al. 2024, arXiv:2405.14734, eq. 6"
    equation: ClassVar[str] = "L = -log sigmoid(beta * [log pi(w)/|w| - log pi(l)/|l|] - gamma)"

    beta: PositiveFloat = Field(
        2.0, description="scale of the mean log-prob; there is no reference"
    )
    gamma: Annotated[float, Field(ge=0)] = Field(0.5, description="target margin")

    @property
    def plan(self) -> Plan:
        return self.pair_plan(anchors=())

    def loss(self, batch: PairBatch) -> LossTerms:
        chosen = batch.chosen
        rejected = batch.rejected
        inputs = (chosen.sequence(), rejected.sequence(), chosen.lengths, rejected.lengths)
        losses = simpo_loss(*inputs, beta=self.beta, gamma=self.gamma)
        rewards = (
            self.beta * masked_mean(chosen.policy, chosen.mask),
            self.beta * masked_mean(rejected.policy, rejected.mask),
        )
        return batch.rows("simpo", self.weighted(losses, batch), rewards=rewards)
