"""One importance ratio for each completion where the loss is taken token by token."""

from pydantic import Field
from torch import Tensor

from alignkit.batches import RolloutBatch, TokenLogps
from alignkit.kl import importance
from alignkit.objectives.exploration import ExploringGroup
from alignkit.objectives.rollout_base import Credit, advantages_of, check_whole, unspread
from alignkit.tensors import masked_mean


def completion_ratio(tokens: TokenLogps) -> Tensor:
    """The geometric mean of the importance ratios of a completion's tokens: [N].

    GSPO, Zheng et al. 2025, arXiv:2507.18071, eq. 7.
    """
    mask = tokens.mask
    return importance(masked_mean(tokens.policy, mask), masked_mean(tokens.get("behavior"), mask))


class RatioGroup(ExploringGroup):
    """A group objective with a loss per token, whose importance ratio may be the completion's."""

    ratio: Credit = Field(
        "token",
        description="importance ratio of a token: its own, or (sequence) the geometric mean of its "
        "completion's, as in GSPO",
    )

    def ratio_mask(self, tokens: TokenLogps) -> Tensor | None:
        """What the loss takes as `mask`: None where each token has a ratio of its own. ConfigError
        for an episode that was cut into several rows.
        """
        if self.ratio == "token":
            return None
        check_whole(tokens)
        return tokens.mask

    def ratios(self, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
        """Importance ratios and advantages for metrics, both [N, T]; [N] with one per completion."""
        tokens = batch.tokens
        advantages = advantages_of(batch)
        if self.ratio == "token":
            return importance(tokens.policy, tokens.get("behavior")), advantages
        return completion_ratio(tokens), unspread(advantages, tokens)
