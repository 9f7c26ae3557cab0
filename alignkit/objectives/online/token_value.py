"""Token value: the law of the final reward after each next token of the reference's samples."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from alignkit.batches import Draw, LossTerms, Plan, RolloutBatch, Term
from alignkit.errors import ConfigError, ShapeError
from alignkit.objectives.base import Objective


def token_value_loss(bin_logprobs: Tensor, scores: Tensor, *, low: float, high: float) -> Tensor:
    """Cross-entropy of a reward's two-hot target: log-probs [..., B], rewards [...] -> [...].

    The B bins stand evenly from `low` to `high`; a reward between two counts for both, so that their
    mean is the reward, and one outside counts for the last. The minimiser is the law of the reward
    given what the log-probs are given (Zhou et al. 2025, arXiv:2502.20548; two-hot: Imani and White
    2018, arXiv:1806.04613). ShapeError where the shapes do not fit.
    """
    if bin_logprobs.shape[:-1] != scores.shape:
        raise ShapeError(
            f"token_value_loss: bins {list(bin_logprobs.shape)} and scores {list(scores.shape)}; the "
            "bins have one axis more, the last"
        )
    count = bin_logprobs.shape[-1]
    place = ((scores - low) / (high - low) * (count - 1)).clamp(0, count - 1)
    below = place.floor().clamp(max=count - 2).long()
    share = (place - below).to(bin_logprobs.dtype)
    lower = bin_logprobs.gather(-1, below.unsqueeze(-1)).squeeze(-1)
    upper = bin_logprobs.gather(-1, below.unsqueeze(-1) + 1).squeeze(-1)
    return -((1 - share) * lower + share * upper)


def soft_value(bin_logprobs: Tensor, *, low: float, high: float, beta: float) -> Tensor:
    """log E e^(r / beta), the soft value over beta, of a law of bins: [..., B] -> [...]."""
    count = bin_logprobs.shape[-1]
    centres = torch.linspace(low, high, count, dtype=torch.float64, device=bin_logprobs.device)
    return torch.logsumexp(bin_logprobs + (centres / beta).to(bin_logprobs.dtype), dim=-1)


class TokenValue(Objective):
    """Learns the law of the reward to come after each next token of the reference's own samples; one
    training serves every beta, as guidance and as a twist (Q#; Zhou et al. 2025, arXiv:2502.20548).
    """

    paper: ClassVar[str] = "Zhou et al. 2025, arXiv:2502.20548"
    equation: ClassVar[str] = "L = -sum_b two_hot(r(y))_b log P(b | s_t, y_t), y ~ ref, at all t"
    favours_better: ClassVar[Any] = "no preference"

    bins: PositiveInt = Field(41, description="bins of the reward's law")
    low: float = Field(-4.0, description="the reward of the first bin")
    high: float = Field(4.0, description="the reward of the last bin")

    @model_validator(mode="after")
    def _range(self) -> "TokenValue":
        if self.bins < 2 or not self.low < self.high:
            raise ValueError(
                f"bins {self.bins} from low {self.low} to high {self.high}: it takes at least 2 "
                "bins, and low below high"
            )
        return self

    @property
    def plan(self) -> Plan:
        draw = Draw(source="reference")
        return Plan(
            "rollout",
            anchors=(),
            samples=(draw,),
            feedback="reward",
            bins=self.bins,
            credit_reads_policy=False,
        )

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(bins=3, low=-1.0, high=1.0)]

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        if "bin_0" not in tokens.extras:
            raise ConfigError("token_value: the batch has no bins; train it with alignkit's loop")
        laws = torch.stack([tokens.extras[f"bin_{b}"] for b in range(self.bins)], dim=-1)
        scores = batch.scores.to(laws.dtype).unsqueeze(-1).expand(tokens.mask.shape)
        values = token_value_loss(laws, scores, low=self.low, high=self.high)

        # The language-model head learns nothing here, but every parameter has a gradient (DDP).
        values = torch.where(tokens.mask, values + 0 * tokens.policy, 0.0)
        centres = torch.linspace(self.low, self.high, self.bins, device=laws.device)
        error = ((laws.detach().exp() * centres).sum(-1) - scores).square()
        return LossTerms(
            [Term("token_value", values, "tokens")], {"value_error": error[tokens.mask]}
        )
