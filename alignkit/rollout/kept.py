"""What the models of a draw have read of an episode, kept for its next turn, so that a turn reads what
is new and not the whole episode again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.rollout.cached_model import CachedModel, KeptRow


@dataclass(frozen=True)
class Kept:
    """One row in all models of a draw."""

    ids: Tensor  # [L] int64, on the CPU: the tokens that were read
    rows: Mapping[str, KeptRow]  # by the name of the model

    def of(self, name: str, prompt: Tensor) -> KeptRow:
        """As much of it as the tokens `prompt` [P] begin with, but never all of them: the last one
        has to be read, for the law of the next token.
        """
        most = min(len(self.ids), len(prompt) - 1)
        differ = (self.ids[:most] != prompt[:most]).nonzero()[:, 0]
        length = int(differ[0]) if len(differ) else most
        return [(keys[:, :length], values[:, :length]) for keys, values in self.rows[name]]


class Keeper:
    """Keeps the rows of a batch that have ended.

    contexts  what each row began with, [P] each
    room      how many tokens may be kept in all; further rows are read anew
    """

    def __init__(self, contexts: Sequence[Tensor], room: int) -> None:
        self.contexts = contexts
        self.room = room
        self.kept: dict[int, Kept] = {}  # by row

    def keep(self, models: Sequence[CachedModel], place: int, row: int, tokens: Tensor) -> None:
        """Keep row `row`, which the models have at `place`, and which has drawn `tokens` [T]. The
        last of them was not read.
        """
        ids = torch.cat([self.contexts[row], tokens[:-1].cpu()])
        if len(ids) > self.room:
            return
        self.room -= len(ids)
        self.kept[row] = Kept(ids, {model.name: model.kept(place, len(ids)) for model in models})
