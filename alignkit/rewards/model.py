"""A reward model: a sequence classifier with one output reads prompt and completion and gives a
number.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.errors import DataError
from alignkit.policies.module import context_length


class RewardModel:
    """Scores texts with a sequence-classification model of one output, in eval mode; `token_budget`
    bounds a batch's tokens.

    Chats go through the tokenizer's template; for plain text the completion follows the prompt
    directly.
    """

    def __init__(self, model: Any, tokenizer: Any, *, token_budget: int = 16384):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.token_budget = token_budget
        self.longest = context_length(model)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """One score per completion. DataError where prompt and completion exceed the model's
        context.
        """
        rows = [
            self._ids(prompt, completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        scores = [0.0] * len(rows)
        for batch in self._batches(rows):
            for row, score in zip(
                batch, self._score([rows[row] for row in batch])[:, 0].tolist(), strict=True
            ):
                scores[row] = score
        return scores

    def _ids(self, prompt: Any, completion: Any) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt + completion)["input_ids"]
        else:
            turn = (
                [{"role": "assistant", "content": completion}]
                if isinstance(completion, str)
                else list(completion)
            )
            ids = self.tokenizer.apply_chat_template(
                [*prompt, *turn], tokenize=True, return_dict=False
            )
        return self._within(ids)

    def _within(self, ids: list[int]) -> list[int]:
        if len(ids) > self.longest:
            raise DataError(
                f"prompt and completion have {len(ids)} tokens; the reward model reads at most {self.longest}"
            )
        return ids

    def _batches(self, rows: list[list[int]]) -> list[list[int]]:
        """Indices of rows, longest first, so that a batch is its first row's width."""
        batches: list[list[int]] = []
        for row in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
            if (
                not batches
                or (len(batches[-1]) + 1) * len(rows[batches[-1][0]]) > self.token_budget
            ):
                batches.append([])
            batches[-1].append(row)
        return batches

    def _score(self, rows: list[list[int]]) -> Tensor:
        """Outputs [B, D] float32 of token ids, padded on the right: the model reads the last token
        that is not padding.
        """
        device = next(self.model.parameters()).device
        width = len(rows[0])
        pad = self.model.config.get_text_config().pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = (torch.arange(width, device=device) < lengths[:, None]).long()
        return self.model(input_ids=ids, attention_mask=mask).logits.float()
