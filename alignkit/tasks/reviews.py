"""Short film reviews whose every completion can be listed:
controlled sentiment with an exact reward.

    the western about a small circus : | gripping story , wooden acting , weak ending

A critics' corpus written by a small grammar trains the base model. The reward of a review is the
sum of its words' sentiments; everything the grammar cannot write is one further outcome with the
lowest reward. Pairs are samples of the base model, whatever they look like, labelled by
Bradley-Terry on that reward, so that DPO's optimum on them is exactly ref * exp(reward / beta) / Z.
"""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from itertools import product
from typing import TYPE_CHECKING, Any

from alignkit.tasks.definition import BaseConfig

if TYPE_CHECKING:
    from alignkit.judges.base import Verdict

FORMAT = 2  # raise it when this file or dataset.py makes other files from the same definition
AFFINITY = 0.5  # spread of a prompt's taste for single words in the corpus
GRUDGE = 0.5  # how much the critics prefer negative words
MOOD = 0.8  # how much a word's sentiment carries over to the next word


@dataclass(frozen=True)
class Slot:
    """One part of a review: a word with a sentiment, then fixed text."""

    words: Mapping[str, float]
    after: str


@dataclass(frozen=True)
class Reviews:
    """The task in one size: its grammar, its reward and how much of everything there is."""

    name: str
    genres: Sequence[str]
    subjects: Sequence[str]
    slots: Sequence[Slot]
    outside: float  # the reward of everything the grammar cannot write; below every review's
    base: BaseConfig
    corpus: int  # reviews the base model learns from
    pairs: int
    held_out: int = 500  # further pairs and demonstrations, for evaluation
    cap: int = 16  # tokens of a sample; more than any review has
    heat: float = 1.5  # temperature of a pair's second sample
    seed: int = 0

    @cached_property
    def prompts(self) -> list[str]:
        """Every prompt, P of them."""
        return [
            f"the {genre} about {subject} :" for genre in self.genres for subject in self.subjects
        ]

    @cached_property
    def rewards(self) -> dict[str, float]:
        """Every review the grammar can write -> its reward, n of them; the same for all prompts."""
        return {
            self._text(words): sum(s.words[w] for s, w in zip(self.slots, words))
            for words in product(*self._choices())
        }

    @property
    def vocabulary(self) -> list[str]:
        """Every word, in the order of the token ids."""
        texts = [
            *self.prompts,
            *(f"{word} {slot.after}" for slot in self.slots for word in slot.words),
        ]
        return list(dict.fromkeys(word for text in texts for word in text.split()))

    @property
    def key(self) -> str:
        """The cache's name for what this definition makes."""
        content = json.dumps(
            {"format": FORMAT, "constants": [AFFINITY, GRUDGE, MOOD], **asdict(self)}
        )
        return f"{self.name}-{sha256(content.encode()).hexdigest()[:12]}"

    def reward(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float]:
        """The exact reward of each completion, in TRL's signature. White space does not count.

        A completion cut at a cap of more tokens than a review has is longer than any review, and so
        outside the grammar.
        """
        return [
            self.rewards.get(" ".join(completion.split()), self.outside)
            for completion in completions
        ]

    def judge(
        self, prompts: Sequence[Any], first: Sequence[str], second: Sequence[str]
    ) -> "Verdict":
        """How often the first completion wins, by Bradley-Terry on the reward as in the pairs: B
        texts each -> Verdict of [B].
        """
        from alignkit.judges.base import BradleyTerry  # imports torch

        return BradleyTerry(self.reward)(prompts, first, second)

    def corpus_rows(self, n: int) -> Iterator[dict[str, str]]:
        """The critics' corpus: `n` rows (prompt, completion). A prompt has its favourite words, a
        review its mood.
        """
        taste = random.Random(f"taste {self.seed}")
        liking = {
            prompt: [[taste.gauss(0, AFFINITY) for _ in slot.words] for slot in self.slots]
            for prompt in self.prompts
        }

        critic = random.Random(f"critic {self.seed}")
        for i in range(n):
            prompt = self.prompts[i % len(self.prompts)]
            words = []
            before = 0.0  # the sentiment of the word before
            for slot, likes in zip(self.slots, liking[prompt]):
                weights = [
                    math.exp(like + (MOOD * before - GRUDGE) * sentiment)
                    for like, sentiment in zip(likes, slot.words.values())
                ]
                word = critic.choices(list(slot.words), weights)[0]
                before = slot.words[word]
                words.append(word)
            yield {"prompt": prompt, "completion": " " + self._text(words)}

    def _choices(self) -> list[list[str]]:
        return [list(slot.words) for slot in self.slots]

    def _text(self, words: Sequence[str]) -> str:
        return " ".join(f"{word} {slot.after}" for slot, word in zip(self.slots, words))


STORY = {
    "gripping": 1.2,
    "charming": 0.6,
    "solid": 0.2,
    "familiar": -0.2,
    "thin": -0.6,
    "hopeless": -1.2,
}
ACTING = {"superb": 1.2, "warm": 0.6, "steady": 0.2, "plain": -0.2, "wooden": -0.6, "awful": -1.2}
ENDING = {"perfect": 1.2, "clever": 0.6, "fair": 0.2, "sudden": -0.2, "weak": -0.6, "absurd": -1.2}

REVIEWS = {
    reviews.name: reviews
    for reviews in (
        Reviews(
            name="reviews",
            genres=("comedy", "thriller", "drama", "western"),
            subjects=("a lonely robot", "two rival chefs", "a retired spy", "a small circus"),
            slots=(Slot(STORY, "story ,"), Slot(ACTING, "acting ,"), Slot(ENDING, "ending")),
            outside=-4.0,
            base=BaseConfig(hidden=64, layers=2, steps=2000, batch_size=32, learning_rate=1e-2),
            corpus=16_000,
            pairs=60_000,
        ),
        Reviews(
            name="reviews_small",  # for tests: seconds instead of a minute
            genres=("comedy", "western"),
            subjects=("a lonely robot", "a small circus"),
            slots=(
                Slot({"gripping": 1.2, "solid": 0.3, "thin": -0.3, "hopeless": -1.2}, "story ,"),
                Slot({"superb": 1.2, "steady": 0.3, "wooden": -0.3, "awful": -1.2}, "acting"),
            ),
            outside=-3.0,
            base=BaseConfig(hidden=32, layers=1, steps=300, batch_size=32, learning_rate=2e-2),
            corpus=4_000,
            pairs=4_000,
            held_out=100,
            cap=8,
        ),
    )
}
