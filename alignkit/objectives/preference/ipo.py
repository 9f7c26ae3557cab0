"""Identity preference optimisation."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, PairBatch
from alignkit.errors import ConfigError
from alignkit.objectives.base import Objective
from alignkit.objectives.preference.weighting import WeighablePairs
from alignkit.tensors import pair_log_ratios


def ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    tau: float,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """IPO loss per pair: [B] x 4 -> [B]. With `chosen_lengths` and `rejected_lengths` (tokens, [B])
    each log-ratio is divided by its length first (the form behind the paper's reported numbers);
    `tau` does not transfer between the forms.

    Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ConfigError("ipo_loss: give both chosen_lengths and rejected_lengths, or neither")
    chosen, rejected = pair_log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    if chosen_lengths is not None and rejected_lengths is not None:
        chosen = chosen / chosen_lengths.clamp(min=1)
        rejected = rejected / rejected_lengths.clamp(min=1)
    return (chosen - rejected - 1 / (2 * tau)) ** 2


class IPO(WeighablePairs):
    """Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036, eq. 17)."""

    paper: ClassVar[str] = "Azar et al. 2023, arXiv:2310.12036, eq. 17"
    equation: ClassVar[str] = (
        "L = (h(w) - h(l) - 1/(2 tau))^2, "
        "h = log pi/ref summed over the tokens (form sum, as in the paper) "
        "or averaged (form mean, as in TRL)"
    )

    tau: PositiveFloat = Field(0.1, description="regularisation; the target margin is 1 / (2 tau)")
    form: Literal["sum", "mean"] = Field(
        "sum",
        description="sum: of the tokens' log-ratios, as in the paper (eq. 17); mean: over the length, "
        "as in TRL",
    )

    def loss(self, batch: PairBatch) -> LossTerms:
        lengths = (
            {}
            if self.form == "sum"
            else {
                "chosen_lengths": batch.chosen.lengths,
                "rejected_lengths": batch.rejected.lengths,
            }
        )
        losses = ipo_loss(*batch.sequence_logps(), tau=self.tau, **lengths)
        return batch.rows("ipo", self.weighted(losses, batch), scale=self.tau)

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """ref * exp(P(y beats mu) / tau) for Bradley-Terry labels of `reward` and uniform opponents
        mu; sum form without weights only.
        """
        if self.form == "mean" or self.weighting != "none":
            return None
        return (reference + self.label_probability(reward).mean(-1) / self.tau).log_softmax(-1)

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(form="mean")]
