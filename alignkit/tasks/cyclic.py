"""Film reviews whose readers go in circles: a preference game
of known table on top of the task `reviews`.

Every part of a review (story, acting, ending) is glowing, even or harsh. Readers find glowing
livelier than even, even fairer than harsh, and harsh more honest than glowing: rock, paper,
scissors, part by part. No reward explains such a taste, and the best policy is a mixture. Prompts,
base model and grammar are those of `reviews`; what the grammar cannot write loses to every review.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from alignkit.tasks.reviews import REVIEWS, Reviews

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.judges.base import Verdict

STYLES = 3  # style s beats style s + 1, modulo 3
STRENGTH = 1.5  # log-odds that one part adds
OUTSIDE = 3.0  # log-odds by which any review beats what the grammar cannot write


def styles(reviews: Reviews) -> dict[str, list[int]]:
    """Every review of the grammar -> the style of each part: 0 glowing, 1 even, 2 harsh (thirds of
    the slot's words).
    """
    style: dict[tuple[int, str], int] = {}
    for part, slot in enumerate(reviews.slots):
        best_first = sorted(slot.words, key=lambda word: -slot.words[word])
        for rank, word in enumerate(best_first):
            style[part, word] = rank * STYLES // len(best_first)

    sentiments = {word for slot in reviews.slots for word in slot.words}
    return {
        review: [
            style[part, word]
            for part, word in enumerate(word for word in review.split() if word in sentiments)
        ]
        for review in reviews.rewards
    }


@cache
def preference_table(reviews_name: str) -> "Tensor":
    """P(row beats column) over the n reviews and, last, everything else: [n + 1, n + 1] float64, P
    + P^T = 1.
    """
    import torch

    parts = torch.tensor(list(styles(REVIEWS[reviews_name]).values()))  # [n, parts]
    # How far the column's style is ahead of the row's.
    ahead = (parts.unsqueeze(0) - parts.unsqueeze(1)) % STYLES
    wins = (ahead == 1).double() - (ahead == 2).double()
    log_odds = torch.nn.functional.pad(STRENGTH * wins.sum(-1), (0, 1, 0, 1))
    log_odds[:-1, -1] = OUTSIDE
    log_odds[-1, :-1] = -OUTSIDE
    return log_odds.sigmoid()


class CyclicJudge:
    """A judge that looks its verdict up in the table. White space does not count."""

    def __init__(self, reviews_name: str):
        self.reviews_name = reviews_name
        self.index = {review: i for i, review in enumerate(REVIEWS[reviews_name].rewards)}

    def __call__(
        self, prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]
    ) -> "Verdict":
        """How often the first wins: B texts each -> Verdict of [B]."""
        import torch

        from alignkit.judges.base import Verdict

        table = preference_table(self.reviews_name)
        wins = table[self._outcomes(first), self._outcomes(second)]
        return Verdict(wins, torch.ones(len(first), dtype=torch.bool))

    def _outcomes(self, texts: Sequence[str]) -> list[int]:
        return [self.index.get(" ".join(text.split()), len(self.index)) for text in texts]


@dataclass(frozen=True)
class Cyclic:
    """`reviews` with a judge."""

    name: str
    base: Reviews

    @property
    def key(self) -> str:
        """The files are those of the reviews."""
        return self.base.key

    @property
    def judge(self) -> CyclicJudge:
        """The readers' taste."""
        return CyclicJudge(self.base.name)

    def reward(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float]:
        """The reward of the reviews, which the readers do not share."""
        return self.base.reward(prompts, completions, **columns)


CYCLIC = {
    "cyclic": Cyclic("cyclic", REVIEWS["reviews"]),
    "cyclic_small": Cyclic("cyclic_small", REVIEWS["reviews_small"]),
}
