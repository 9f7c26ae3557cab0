"""AOT: alignment by optimal transport, DPO between the order statistics of a batch's rewards."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.batches import LossTerms, PairBatch, Plan
from alignkit.errors import ConfigError
from alignkit.objectives.base import Objective, PairObjective
from alignkit.tensors import pair_log_ratios

Form = Literal["paired", "unpaired"]


def aot_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    form: Form = "paired",
    label_smoothing: float = 0.0,
) -> Tensor:
    """AOT loss: [B] x 4 -> [B], one value per rank (order statistic), not per pair. The batch is
    sorted, so its size matters.

    "paired" sorts the policy's margins log pi(w) - log pi(l) and the reference's and compares rank
    by rank; "unpaired" sorts the log-ratios of the chosen and of the rejected responses, so that
    who was paired with whom does not matter. Melnyk et al. 2024, arXiv:2406.05882, with the
    logistic loss.
    """
    chosen, rejected = pair_log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    if form not in ("paired", "unpaired"):
        raise ConfigError(f"aot_loss: form is {form!r}; it must be 'paired' or 'unpaired'")
    if form == "paired":
        high = policy_chosen_logps - policy_rejected_logps
        low = (reference_chosen_logps - reference_rejected_logps).detach()
    else:
        high = chosen
        low = rejected
    logits = beta * (high.sort().values - low.sort().values)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


class AOT(PairObjective):
    """Alignment via optimal transport (Melnyk et al. 2024, arXiv:2406.05882). Sorts the whole step,
    over all processes.
    """

    paper: ClassVar[str] = "Melnyk et al. 2024, arXiv:2406.05882"
    equation: ClassVar[str] = (
        "L = -log sigmoid(beta * [i-th smallest margin of pi - i-th smallest of ref]); or of r(w), r(l)"
    )

    beta: PositiveFloat = Field(0.1, description="strength of the reverse KL to the reference")
    form: Form = Field(
        "paired",
        description="paired sorts margins of pairs, unpaired the two responses' log-ratios",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="probability that an order is flipped"
    )

    @property
    def plan(self) -> Plan:
        return Plan("pair", coupled=True)

    def loss(self, batch: PairBatch) -> LossTerms:
        losses = aot_loss(
            *batch.sequence_logps(),
            beta=self.beta,
            form=self.form,
            label_smoothing=self.label_smoothing,
        )
        return batch.rows("aot", losses, scale=self.beta)

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(form="unpaired", label_smoothing=0.1)]
