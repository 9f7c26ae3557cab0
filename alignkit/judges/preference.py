"""A trained preference model as a judge."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.objectives.reward.preference_model import skew_product
from alignkit.policies.scorer import separator_of
from alignkit.rewards.model import RewardModel


class PreferenceJudge(RewardModel):
    """P(first beats second) from a model that `preference_model` trained; ask it through
    `BothOrders`.

    Either the skew-symmetric product of two embeddings, or both completions read at once, in the
    order given (the config's `alignkit_outputs`, "embedding" or "joined").
    """

    @torch.no_grad()
    def ask(
        self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]
    ) -> list[float]:
        """B queries -> B probabilities. DataError where a text exceeds the model's context."""
        a, b = (
            [self._ids(p, c) for p, c in zip(prompts, texts, strict=True)]
            for texts in (first, second)
        )
        if self.model.config.alignkit_outputs == "embedding":
            outputs = self._outputs(a + b)
            return skew_product(outputs[: len(a)], outputs[len(a) :]).sigmoid().tolist()
        between = separator_of(self.tokenizer)
        rows = [
            self._within([*x, between, *y[len(self._prompt(p, x, y)) :]])
            for p, x, y in zip(prompts, a, b)
        ]
        return self._outputs(rows)[:, 0].sigmoid().tolist()

    def _prompt(self, prompt: Any, first: list[int], second: list[int]) -> list[int]:
        """The tokens that belong to the prompt: what both texts begin with, no longer than the
        prompt alone.
        """
        if isinstance(prompt, str):
            alone = self.tokenizer(prompt)["input_ids"]
        else:
            alone = self.tokenizer.apply_chat_template(
                list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        limit = min(len(first), len(second)) - 1
        shared = next(
            (i for i, (x, y, z) in enumerate(zip(alone, first, second)) if not x == y == z),
            min(len(alone), limit),
        )
        return first[: min(shared, limit)]

    def _outputs(self, rows: list[list[int]]) -> Tensor:
        """Outputs [n, D] of token ids, batch by batch."""
        found = torch.zeros(len(rows), self.model.config.num_labels)
        for batch in self._batches(rows):
            found[batch] = self._score([rows[row] for row in batch]).cpu()
        return found
