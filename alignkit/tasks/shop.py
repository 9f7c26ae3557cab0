"""A shop in which looking pays: a world of one to four turns, small enough for exact figures.

    want tea | look <eos> shelf left | take left <eos>

What the customer wants stands on one of three shelves, and nobody is told on which. Each turn, the
policy takes from a shelf, which ends the episode, or calls the tool: looking costs a little and
says which shelf it is. The base model mostly takes at random; looking first is worth its price.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import ClassVar

from alignkit.tasks.definition import BaseConfig

FORMAT = 1  # raise it when this file or build.py makes other files from the same definition

WISHES = ("tea", "cocoa", "coffee", "milk")
SHELVES = ("left", "middle", "right")
TAKES = tuple(f"take {shelf}" for shelf in SHELVES)
LOOK = "look"
TURNS = (*TAKES, LOOK)  # everything that the grammar can say in a turn
MOST_TURNS = 4

RIGHT = 1.0  # reward of taking from the right shelf; from a wrong one it is 0
PRICE = 0.1  # of looking once
NONSENSE = -0.5  # reward of a turn outside the grammar, which ends the episode


class ShopWorld:
    """The environment. `seed` hides what is wanted behind one of the shelves."""

    hidden = SHELVES[0]
    looks = 0

    def seed(self, number: int) -> None:
        """Chooses the shelf."""
        self.hidden = SHELVES[number % len(SHELVES)]

    def reset(self, **row: object) -> None:
        """A new customer."""
        self.looks = 0

    def step(self, text: str) -> tuple[str, float, bool]:
        """What happens after a turn: (words, reward, done)."""
        turn = " ".join(text.split())
        if turn in TAKES:
            return "", RIGHT * (turn == f"take {self.hidden}"), True
        if turn != LOOK:
            return "", NONSENSE, True
        self.looks += 1
        return observation(self.hidden), -PRICE, self.looks == MOST_TURNS

    def state(self) -> str:
        """What is known of the shelf, and how often the policy has looked."""
        return f"{self.looks} {self.hidden}" if self.looks else "new"


def observation(shelf: str) -> str:
    """What looking shows."""
    return f" shelf {shelf}"


def context(prompt: str, looks: int, shelf: str, eos: str) -> str:
    """The text that a turn continues after so many looks."""
    return prompt + f" {LOOK} {eos}{observation(shelf)}" * looks


@dataclass(frozen=True)
class Shop:
    """The task in one size."""

    name: str
    base: BaseConfig
    rows: int  # turns that the base model is trained on
    looking: float = 0.25  # how often a base customer looks
    believing: float = 0.6  # how often it then takes from the shelf that it saw
    seed: int = 0

    reward: ClassVar[None] = None  # the environment gives it
    judge: ClassVar[None] = None
    environment: ClassVar[type[ShopWorld]] = ShopWorld

    @property
    def prompts(self) -> list[str]:
        """Every wish."""
        return [f"want {wish}" for wish in WISHES]

    @property
    def vocabulary(self) -> list[str]:
        """All words."""
        return ["want", *WISHES, "look", "take", "shelf", *SHELVES]

    @property
    def key(self) -> str:
        """The cache's name for what this definition makes."""
        content = json.dumps({"format": FORMAT, **asdict(self)})
        return f"{self.name}-{sha256(content.encode()).hexdigest()[:12]}"

    def turns(self, eos: str) -> Iterator[dict[str, str]]:
        """What base customers say: the context and the words of single turns."""
        chance = random.Random(f"turns {self.seed}")
        for _ in range(self.rows):
            looks = chance.choice((0, 0, 1, 2, 3))
            shelf = chance.choice(SHELVES)
            prompt = context(chance.choice(self.prompts), looks, shelf, eos)
            yield {"prompt": prompt, "completion": " " + self._turn(chance, looks, shelf)}

    def _turn(self, chance: random.Random, looks: int, shelf: str) -> str:
        if chance.random() < self.looking:
            return LOOK
        if looks and chance.random() < self.believing:
            return f"take {shelf}"
        return chance.choice(TAKES)


SHOP = {
    shop.name: shop
    for shop in (
        Shop("shop", BaseConfig(hidden=48, layers=2, steps=250, learning_rate=5e-3), rows=20_000),
        Shop(  # for tests: seconds
            "shop_small",
            BaseConfig(hidden=24, layers=2, steps=60, batch_size=32, learning_rate=1e-2),
            rows=2_000,
        ),
    )
}
