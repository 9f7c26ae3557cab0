"""A trained preference model as a judge."""

from collections.abc import Sequence
from typing import Any

from alignkit.objectives.reward.preference_model import skew_product
from alignkit.policies.scorer import separator_of
from alignkit.rewards.model import TextScorer


class PreferenceJudge(TextScorer):
    """P(first beats second) from a model that `preference_model`
    trained; ask it through `BothOrders`.

    Either the skew-symmetric product of two embeddings, or both completions read at once, in the
    order given (the config's `alignkit_outputs`, "embedding" or "joined").
    """

    def ask(
        self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]
    ) -> list[float]:
        """B queries -> B probabilities. DataError where a text exceeds the model's context."""
        first_ids = [self.token_ids(*text) for text in zip(prompts, first, strict=True)]
        second_ids = [self.token_ids(*text) for text in zip(prompts, second, strict=True)]
        probabilities: list[float]

        if self.model.config.alignkit_outputs == "embedding":
            embeddings = self.outputs(first_ids + second_ids)
            count = len(first_ids)
            odds = skew_product(embeddings[:count], embeddings[count:])
            probabilities = odds.sigmoid().tolist()
            return probabilities

        # The model was trained on `prompt first | separator | second`, the prompt once.
        separator = separator_of(self.tokenizer)
        rows = []
        for prompt, one, other in zip(prompts, first_ids, second_ids):
            shared = len(self._prompt(prompt, one, other))
            rows.append(self.within_context([*one, separator, *other[shared:]]))
        probabilities = self.outputs(rows)[:, 0].sigmoid().tolist()
        return probabilities

    def _prompt(self, prompt: Any, first: list[int], second: list[int]) -> list[int]:
        """The tokens that belong to the prompt: what both texts begin
        with, no longer than the prompt alone.
        """
        if isinstance(prompt, str):
            alone = self.tokenizer(prompt)["input_ids"]
        else:
            alone = self.template.ids(prompt, prompt=True)

        # Each completion keeps at least one token of its own.
        limit = min(len(first), len(second)) - 1
        shared = 0
        for expected, one, other in zip(alone, first, second):
            if shared == limit or not expected == one == other:
                break
            shared += 1
        return first[:shared]
