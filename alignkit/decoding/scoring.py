"""The reward as decoders ask it: of completions, and of texts that are not finished yet."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.data.prompts import Prompt
from alignkit.errors import DataError, NumericsError, first_line
from alignkit.rewards.call import RewardCall, call_reward
from alignkit.rollout.text import as_reply, decode_all


@dataclass(frozen=True)
class Scorer:
    """A reward with the tokenizer that makes texts of tokens."""

    reward: RewardCall
    tokenizer: Any

    def of_completions(self, prompts: Sequence[Prompt], ids: Sequence[Sequence[Tensor]]) -> Tensor:
        """The reward of K completions [T] of each of P prompts: [P, K] float64.

        DataError where the reward does not apply to one of them, since then no candidate can be
        preferred to it; what `call_reward` raises otherwise.
        """
        texts = decode_all(self.tokenizer, ids)
        replies = [[as_reply(p.text, text) for text in row] for p, row in zip(prompts, texts)]
        numbers = [[tokens.tolist() for tokens in row] for row in ids]
        scores = call_reward(self.reward, prompts, replies, numbers)
        if any(score is None for row in scores for score in row):
            raise DataError(
                f"decoding: the reward {_name(self.reward)} gives no score for a completion; a "
                "decoder needs one for each"
            )
        return torch.tensor(scores, dtype=torch.float64)

    def of_unfinished(self, prompts: Sequence[Prompt], ids: Sequence[Tensor]) -> Tensor:
        """The reward of one unfinished text of each of L prompts: [L] float64. DataError where the
        reward cannot score such texts.
        """
        try:
            return self.of_completions(prompts, [[tokens] for tokens in ids])[:, 0]
        except (DataError, NumericsError) as error:
            raise DataError(
                f"twist reward: the reward {_name(self.reward)} cannot score unfinished text "
                f"({first_line(error)}); take twist: none, or a learned value"
            ) from error


def _name(reward: RewardCall) -> str:
    return str(getattr(reward, "__name__", type(reward).__name__))
