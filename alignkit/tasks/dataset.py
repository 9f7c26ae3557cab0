"""The rows of a world, made by its base model: preference pairs, demonstrations, prompts.

A pair is a sample at temperature 1 and one at the world's `heat`. Both have full support, and what
is rare (a rave, a text outside the grammar) comes often enough to be learned from: with both at 1,
DPO at a brisk learning rate can drift outside the grammar before it sees enough of it. Labels are
Bradley-Terry on the reward whatever the pair, so DPO's optimum does not depend on the temperatures.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from alignkit.config.model import ModelConfig
from alignkit.policies.load import load_model, load_tokenizer
from alignkit.tasks.sampling import sample_counts, shuffled

BEST_OF = 4  # a demonstration is the best of this many samples


class World(Protocol):
    """What rows are made from: prompts, an exact reward and how many pairs are wanted."""

    pairs: int
    held_out: int
    heat: float
    cap: int
    seed: int

    @property
    def prompts(self) -> list[str]:
        """Every prompt."""
        ...

    def reward(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """The exact reward of each completion."""
        ...


def write_rows(world: World, model: Path, folder: Path) -> None:
    """Write `folder`/{pairs,demonstrations,prompts}_{train,eval}.jsonl."""
    folder.mkdir()
    samples = _Samples(world, model)
    for split, pairs in (("train", world.pairs), ("eval", world.held_out)):
        _write(folder / f"pairs_{split}.jsonl", _pairs(samples, pairs))
        _write(folder / f"demonstrations_{split}.jsonl", _demonstrations(samples, pairs // 20))
        _write(folder / f"prompts_{split}.jsonl", [{"prompt": prompt} for prompt in world.prompts])


class _Samples:
    """Samples of the base model from its whole distribution, inside the grammar or not."""

    def __init__(self, world: World, model: Path):
        config = ModelConfig(name_or_path=str(model))
        self.world = world
        self.tokenizer = load_tokenizer(config)
        self.model, _ = load_model(config, device="cpu")
        self.generator = np.random.default_rng(world.seed)

    def draw(self, prompt: str, n: int, temperature: float) -> list[str]:
        """`n` independent samples as text."""
        ids = torch.tensor(self.tokenizer(prompt)["input_ids"])
        eos = self.tokenizer.eos_token_id
        counts = sample_counts(
            self.model,
            ids,
            n,
            eos=eos,
            cap=self.world.cap,
            generator=self.generator,
            temperature=temperature,
        )
        texts = [
            (" " + self.tokenizer.decode([i for i in ids if i != eos]), count)
            for ids, count in counts
        ]
        return shuffled(texts, self.generator)

    def groups(
        self, n: int, temperatures: Sequence[float]
    ) -> list[tuple[str, list[str], list[float]]]:
        """`n` groups of (prompt, a sample at each temperature, their rewards), the prompts in turn.

        Groups without a difference (they teach nothing) or with an empty sample (no row may hold
        one) are drawn anew.
        """
        per = math.ceil(n / len(self.world.prompts))
        columns = []
        for prompt in self.world.prompts:
            kept: list[list[str]] = []
            while missing := per - len(kept):
                drawn = zip(
                    *(self.draw(prompt, missing, temperature) for temperature in temperatures)
                )
                kept += [
                    list(group)
                    for group in drawn
                    if len(set(group)) > 1 and all(text.strip() for text in group)
                ]
            columns.append(
                [(prompt, group, self.world.reward([prompt] * len(group), group)) for group in kept]
            )
        return [row for rows in zip(*columns) for row in rows][:n]


def _pairs(samples: _Samples, n: int) -> Iterable[dict[str, Any]]:
    """Two samples each, the chosen one by Bradley-Terry: P(first is chosen) = sigmoid(reward
    difference).
    """
    for prompt, (first, second), (a, b) in samples.groups(n, (1.0, samples.world.heat)):
        wins = samples.generator.random() < 1 / (1 + math.exp(b - a))
        (chosen, x), (rejected, y) = (
            ((first, a), (second, b)) if wins else ((second, b), (first, a))
        )
        yield {
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
            "chosen_score": x,
            "rejected_score": y,
        }


def _demonstrations(samples: _Samples, n: int) -> Iterable[dict[str, Any]]:
    """What a kinder critic would write: the best of a few samples."""
    for prompt, texts, scores in samples.groups(n, (1.0,) * BEST_OF):
        yield {"prompt": prompt, "completion": texts[int(np.argmax(scores))]}


def _write(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
