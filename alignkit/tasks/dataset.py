"""The rows of a task, made by its base model: preference pairs, demonstrations, prompts.

A pair is a sample at temperature 1 and one at the definition's `heat`. Both have full support, and
what is rare (a rave, a text outside the grammar) comes often enough to be learned from: with both
at 1, DPO at a brisk learning rate can drift outside the grammar before it sees enough of it. Labels
are Bradley-Terry on the reward whatever the pair, so DPO's optimum does not depend on the
temperatures.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignkit import files
from alignkit.config.model import ModelConfig
from alignkit.policies.load import load_model
from alignkit.policies.tokenizer import load_tokenizer
from alignkit.tasks.reviews import Reviews
from alignkit.tasks.sampling import sample_counts, shuffled

BEST_OF = 4  # a demonstration is the best of this many samples

Group = tuple[str, list[str], list[float]]  # a prompt, some samples of it, their rewards
Row = dict[str, Any]


def write_rows(reviews: Reviews, model: Path, folder: Path) -> None:
    """Write `folder`/{pairs,demonstrations,prompts}_{train,eval}.jsonl."""
    folder.mkdir()
    samples = _Samples(reviews, model)
    prompts = [{"prompt": prompt} for prompt in reviews.prompts]

    for split, n in (("train", reviews.pairs), ("eval", reviews.held_out)):
        files.write_jsonl(folder / f"pairs_{split}.jsonl", _pairs(samples, n))
        demonstrations = _demonstrations(samples, n // 20)
        files.write_jsonl(folder / f"demonstrations_{split}.jsonl", demonstrations)
        files.write_jsonl(folder / f"prompts_{split}.jsonl", prompts)


class _Samples:
    """Samples of the base model from its whole distribution, inside the grammar or not."""

    def __init__(self, reviews: Reviews, model: Path):
        config = ModelConfig(name_or_path=str(model))
        self.reviews = reviews
        self.tokenizer = load_tokenizer(config)
        self.model, _ = load_model(config, device="cpu")
        self.generator = np.random.default_rng(reviews.seed)

    def draw(self, prompt: str, n: int, temperature: float) -> list[str]:
        """`n` independent samples as text."""
        eos = self.tokenizer.eos_token_id
        counts = sample_counts(
            self.model,
            torch.tensor(self.tokenizer(prompt)["input_ids"]),
            n,
            eos=eos,
            cap=self.reviews.cap,
            generator=self.generator,
            temperature=temperature,
        )

        texts = []
        for ids, count in counts:
            text = self.tokenizer.decode([token for token in ids if token != eos])
            texts.append((" " + text, count))
        return shuffled(texts, self.generator)

    def groups(self, n: int, temperatures: Sequence[float]) -> list[Group]:
        """`n` groups of (prompt, a sample at each temperature, their rewards), the prompts in turn.

        Groups without a difference (they teach nothing) or with an empty sample (no row may hold
        one) are drawn anew.
        """
        per_prompt = math.ceil(n / len(self.reviews.prompts))
        columns: list[list[Group]] = []
        for prompt in self.reviews.prompts:
            groups: list[list[str]] = []
            while missing := per_prompt - len(groups):
                drawn = zip(*(self.draw(prompt, missing, heat) for heat in temperatures))
                groups += [
                    list(group)
                    for group in drawn
                    if len(set(group)) > 1 and all(text.strip() for text in group)
                ]
            columns.append(
                [
                    (prompt, group, self.reviews.reward([prompt] * len(group), group))
                    for group in groups
                ]
            )

        in_turn = [group for groups_of_all in zip(*columns) for group in groups_of_all]
        return in_turn[:n]


def _pairs(samples: _Samples, n: int) -> list[Row]:
    """Two samples each, the chosen one by Bradley-Terry: P(first
    is chosen) = sigmoid(reward difference).
    """
    rows = []
    for prompt, texts, scores in samples.groups(n, (1.0, samples.reviews.heat)):
        first_wins = samples.generator.random() < 1 / (1 + math.exp(scores[1] - scores[0]))
        chosen = 0 if first_wins else 1
        rejected = 1 - chosen

        rows.append(
            {
                "prompt": prompt,
                "chosen": texts[chosen],
                "rejected": texts[rejected],
                "chosen_score": scores[chosen],
                "rejected_score": scores[rejected],
            }
        )
    return rows


def _demonstrations(samples: _Samples, n: int) -> list[Row]:
    """What a kinder critic would write: the best of a few samples."""
    return [
        {"prompt": prompt, "completion": texts[int(np.argmax(scores))]}
        for prompt, texts, scores in samples.groups(n, (1.0,) * BEST_OF)
    ]
