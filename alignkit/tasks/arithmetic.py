"""Addition with a verifiable answer: a base model that is right about a third of the time, and a
reward that is 1 or 0.

    47+85= | 231

Digits of the answer come in reverse, units first, so that carrying needs no look-ahead. The base
model is trained on correct sums of the training split and stopped early; its errors are those of a
model that has half understood. Prompts of the splits `train`, `eval` (for early stopping) and
`test` are disjoint.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, ClassVar

from alignkit.tasks.definition import BaseConfig

FORMAT = 1  # raise it when this file or build.py makes other files from the same definition
CHARACTERS = "0123456789+="


def answer(prompt: str) -> str | None:
    """The right completion of a prompt like `47+85=`, digits
    reversed; None where the prompt is not a sum.
    """
    first, plus, rest = prompt.strip().partition("+")
    second, equals, after = rest.partition("=")
    if not (plus and equals) or after or not (first.isdecimal() and second.isdecimal()):
        return None
    return str(int(first) + int(second))[::-1]


def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """1 for the right answer and nothing after it, else 0, in TRL's signature. White space around
    it does not count.
    """
    return [
        float(completion.strip() == answer(prompt))
        for prompt, completion in zip(prompts, completions)
    ]


@dataclass(frozen=True)
class Arithmetic:
    """The task in one size."""

    name: str
    digits: int  # of both summands
    held_out: int  # prompts in each of the splits eval and test
    base: BaseConfig
    seed: int = 0

    judge: ClassVar[None] = None  # right or wrong, there is nothing to judge

    @property
    def cap(self) -> int:
        """Tokens of a sample: the longest answer, its end and one to go wrong with."""
        return self.digits + 3

    @cached_property
    def splits(self) -> dict[str, list[str]]:
        """Prompts per split, shuffled: every ordered pair of summands is in exactly one."""
        numbers = range(10 ** (self.digits - 1) if self.digits > 1 else 0, 10**self.digits)
        prompts = [f"{a}+{b}=" for a in numbers for b in numbers]
        random.Random(f"splits {self.seed}").shuffle(prompts)
        test = prompts[: self.held_out]
        held_out = prompts[self.held_out : 2 * self.held_out]
        train = prompts[2 * self.held_out :]
        return {"train": train, "eval": held_out, "test": test}

    @property
    def key(self) -> str:
        """The cache's name for what this definition makes."""
        content = json.dumps({"format": FORMAT, **asdict(self)})
        return f"{self.name}-{sha256(content.encode()).hexdigest()[:12]}"

    def reward(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float]:
        """1 for the right answer and nothing after it, else 0 (`reward` above)."""
        return reward(prompts, completions, **columns)


ARITHMETIC = {
    sums.name: sums
    for sums in (
        Arithmetic(
            "arithmetic",
            digits=2,
            held_out=500,
            base=BaseConfig(hidden=96, layers=3, steps=800, learning_rate=3e-3),
        ),
        Arithmetic(  # for tests: seconds instead of a minute
            "arithmetic_small",
            digits=1,
            held_out=10,
            base=BaseConfig(hidden=32, layers=2, steps=150, batch_size=32, learning_rate=1e-2),
        ),
    )
}
