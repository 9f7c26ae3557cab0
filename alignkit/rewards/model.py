"""A reward model: a sequence classifier with one output reads
prompt and completion and gives a number.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from alignkit.config.data import DataConfig
from alignkit.data.template import ChatTemplate
from alignkit.errors import DataError, ModelError
from alignkit.policies.module import context_length
from alignkit.rollout.text import as_reply


class TextScorer:
    """A sequence-classification model that reads texts, in evaluation mode, a batch at a time.

    `token_budget` bounds a batch's tokens. Chats go through the tokenizer's template, whose clock
    shows `template_time` (`data.template_time`; auto: the machine's); for plain text the completion
    follows the prompt directly.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        token_budget: int = 16384,
        template_time: str = "auto",
    ):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.token_budget = token_budget
        self.template_time = template_time
        self.longest = context_length(model)

    @cached_property
    def template(self) -> ChatTemplate:
        """The template for chats. ModelError where the tokenizer has none."""
        if not self.tokenizer.chat_template:
            raise ModelError(
                "the prompts are chats, but the tokenizer of the reward or preference model has no "
                "chat template; give it one, or plain texts as prompts"
            )
        return ChatTemplate(self.tokenizer, DataConfig(template_time=self.template_time))

    def token_ids(self, prompt: Any, completion: Any) -> list[int]:
        """Token ids of a prompt with its completion. DataError where they exceed the context."""
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt + completion)["input_ids"]
        else:
            reply = as_reply(prompt, completion) if isinstance(completion, str) else completion
            ids = self.template.ids([*prompt, *reply])
        return self.within_context(self._without_end(ids, chat=not isinstance(prompt, str)))

    def _without_end(self, ids: list[int], *, chat: bool) -> list[int]:
        """What a reward head reads: the tokens before the one that ends the completion, after which
        templates may write more. Other models read all of them.
        """
        end = self.tokenizer.eos_token_id
        if not getattr(self.model.config, "alignkit_before_end", False) or end not in ids:
            return ids
        last = len(ids) - 1 - ids[::-1].index(end)
        return ids[:last] if chat or last == len(ids) - 1 else ids

    def within_context(self, ids: list[int]) -> list[int]:
        """The ids as they are; DataError where the model cannot read so many."""
        if len(ids) > self.longest:
            raise DataError(
                f"prompt and completion have {len(ids)} tokens; the reward model reads at most "
                f"{self.longest}"
            )
        return ids

    @torch.no_grad()
    def outputs(self, rows: list[list[int]]) -> Tensor:
        """The model's outputs of N rows of token ids: [N, D] float32, on the CPU."""
        outputs = torch.zeros(len(rows), self.model.config.num_labels)
        for batch in self._batches(rows):
            outputs[batch] = self._forward([rows[row] for row in batch]).cpu()
        return outputs

    def _batches(self, rows: list[list[int]]) -> list[list[int]]:
        """Indices of rows, longest first, so that a batch is its first row's width."""
        batches: list[list[int]] = []
        for row in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
            width = len(rows[batches[-1][0]]) if batches else 0
            if not batches or (len(batches[-1]) + 1) * width > self.token_budget:
                batches.append([])
            batches[-1].append(row)
        return batches

    def _forward(self, rows: list[list[int]]) -> Tensor:
        """Outputs [B, D] float32 of token ids, longest row first.

        Rows are padded on the right: the model reads the last token that is not padding.
        """
        device = next(self.model.parameters()).device
        width = len(rows[0])
        pad = self.model.config.get_text_config().pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)

        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = (torch.arange(width, device=device) < lengths[:, None]).long()
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits.float()


class RewardModel(TextScorer):
    """Scores completions with a model of one output."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """One score per completion.

        DataError where prompt and completion exceed the model's context.
        """
        rows = [
            self.token_ids(prompt, completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        scores: list[float] = self.outputs(rows)[:, 0].tolist()
        return scores
