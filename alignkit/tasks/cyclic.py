"""Film reviews whose readers go in circles: a preference game of known table on top of the world
`reviews`.

Every part of a review (story, acting, ending) is glowing, even or harsh. Readers find glowing
livelier than even, even fairer than harsh, and harsh more honest than glowing: rock, paper,
scissors, part by part. No reward explains such a taste, and the best policy is a mixture. Prompts,
base model and grammar are those of `reviews`; what the grammar cannot write loses to every review.
"""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from alignkit.tasks import Task
from alignkit.tasks.reviews import WORLDS, World

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.judges import Verdict

STYLES = 3  # style s beats style s + 1, modulo 3
STRENGTH = 1.5  # log-odds that one part adds
OUTSIDE = 3.0  # log-odds by which any review beats what the grammar cannot write

BASES = {"cyclic": "reviews", "cyclic_small": "reviews_small"}


def styles(world: World) -> dict[str, list[int]]:
    """Every review of the grammar -> the style of each part: 0 glowing, 1 even, 2 harsh (thirds of
    the slot's words).
    """
    style = {
        (i, word): rank * STYLES // len(slot.words)
        for i, slot in enumerate(world.slots)
        for rank, word in enumerate(sorted(slot.words, key=lambda w: -slot.words[w]))
    }
    words = {
        review: [w for w in review.split() if any(w in slot.words for slot in world.slots)]
        for review in world.rewards
    }
    return {
        review: [style[i, word] for i, word in enumerate(chosen)]
        for review, chosen in words.items()
    }


@cache
def preference_table(world_name: str) -> "Tensor":
    """P(row beats column) over the n reviews and, last, everything else: [n + 1, n + 1] float64, P
    + P^T = 1.
    """
    import torch

    parts = torch.tensor(list(styles(WORLDS[world_name]).values()))  # [n, parts]
    ahead = (
        parts.unsqueeze(0) - parts.unsqueeze(1)
    ) % STYLES  # how far the column's style is ahead of the row's
    wins = (ahead == 1).double() - (ahead == 2).double()
    log_odds = torch.nn.functional.pad(STRENGTH * wins.sum(-1), (0, 1, 0, 1))
    log_odds[:-1, -1] = OUTSIDE
    log_odds[-1, :-1] = -OUTSIDE
    return log_odds.sigmoid()


class CyclicJudge:
    """A judge that looks its verdict up in the table. White space does not count."""

    def __init__(self, world_name: str):
        self.world_name = world_name
        self.index = {review: i for i, review in enumerate(WORLDS[world_name].rewards)}

    def __call__(
        self, prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]
    ) -> "Verdict":
        """How often the first wins: B texts each -> Verdict of [B]."""
        import torch

        from alignkit.judges import Verdict

        rows = self._outcomes(first)
        columns = self._outcomes(second)
        return Verdict(
            preference_table(self.world_name)[rows, columns],
            torch.ones(len(first), dtype=torch.bool),
        )

    def _outcomes(self, texts: Sequence[str]) -> list[int]:
        return [self.index.get(" ".join(text.split()), len(self.index)) for text in texts]


def task(name: str) -> Task:
    """The task: `reviews` with a judge."""
    base = WORLDS[BASES[name]].task()
    return Task(name, base.model_folder, base.rows_folder, base.reward, CyclicJudge(BASES[name]))
