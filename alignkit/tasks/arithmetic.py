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
from pathlib import Path
from typing import Any

from alignkit.tasks import Task
from alignkit.tasks.base_model import BaseConfig

FORMAT = 1  # raise it when the code below makes other files from the same World
CHARACTERS = "0123456789+="
PROBED = 400  # prompts on which the base model is watched


def answer(prompt: str) -> str | None:
    """The right completion of a prompt like `47+85=`, digits reversed; None where the prompt is not
    a sum.
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
class World:
    """The sizes of one task."""

    name: str
    digits: int  # of both summands
    held_out: int  # prompts in each of the splits eval and test
    base: BaseConfig
    seed: int = 0

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
        """The cache's name for what this world makes."""
        return f"{self.name}-{sha256(json.dumps({'format': FORMAT, **asdict(self)}).encode()).hexdigest()[:12]}"

    def task(self) -> Task:
        """The task with its files, made on first use (under a minute) and cached."""
        from alignkit.tasks.cache import cached_folder
        from alignkit.tasks.worker import run_apart

        folder = cached_folder(self.key, lambda beside: run_apart(self.name, beside))
        return Task(self.name, folder / "model", folder / "rows", reward)

    def build(self, folder: Path) -> None:
        """Train the base model and write the rows: `folder`/model and `folder`/rows."""
        from alignkit.tasks.base_model import character_tokenizer, train_base

        solved = {
            split: [{"prompt": p, "completion": answer(p)} for p in prompts]
            for split, prompts in self.splits.items()
        }
        train_base(
            self.base,
            CHARACTERS,
            solved["train"],
            folder,
            character_tokenizer,
            self._half_understood,
        )
        (folder / "rows").mkdir()
        for split, rows in solved.items():
            _write(folder / "rows" / f"demonstrations_{split}.jsonl", rows)
            _write(
                folder / "rows" / f"prompts_{split}.jsonl",
                [{"prompt": row["prompt"]} for row in rows],
            )

    def _half_understood(self, pair: Any) -> bool:
        """Whether a third of the sampled answers to some training prompts is right."""
        from alignkit.rollout.generate import generate

        prompts = self.splits["train"][:PROBED]
        answers = generate(pair, prompts, max_new_tokens=self.cap)
        return sum(reward(prompts, [texts[0] for texts in answers])) >= len(prompts) / 3


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


WORLDS = {
    world.name: world
    for world in (
        World(
            "arithmetic",
            digits=2,
            held_out=500,
            base=BaseConfig(hidden=96, layers=3, steps=800, learning_rate=3e-3),
        ),
        World(  # for tests: seconds instead of a minute
            "arithmetic_small",
            digits=1,
            held_out=10,
            base=BaseConfig(hidden=32, layers=2, steps=150, batch_size=32, learning_rate=1e-2),
        ),
    )
}


def task(name: str) -> Task:
    """The task of a world by name."""
    return WORLDS[name].task()
