"""A sequence-to-sequence reward model: what it would write in an answer's place says which tokens of
the answer are good (Zhou et al. 2024, arXiv:2409.00162).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.data.messages import Text
from alignkit.data.rewrites import asked_to_rewrite
from alignkit.errors import DataError
from alignkit.rewards.model import TextScorer
from alignkit.rollout.text import decode

TOKENS = 4096  # in a batch, each with the logits of the whole vocabulary


def rewrite_rewards(agreed: Sequence[bool]) -> list[float]:
    """The reward of each token of an answer, from whether the rewriter would write it behind those
    before it: 1 up to the first that it would not, then -1 for those that it would not, else 0.

    The tokens before the first difference are where answer and greedy rewrite are the same, so the
    rewrite itself need not be drawn.
    """
    first = list(agreed).index(False) if not all(agreed) else len(agreed)
    return [1.0] * first + [0.0 if same else -1.0 for same in agreed[first:]]


class Rewriter(TextScorer):
    """Rewards of single tokens by a language model that was trained to rewrite answers
    (`data.rewrite`), with the policy's tokenizer. `ask` is the text by which it was asked.
    """

    def __init__(self, model: Any, tokenizer: Any, ask: str, *, template_time: str = "auto"):
        super().__init__(model, tokenizer, token_budget=TOKENS, template_time=template_time)
        self.ask = ask

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **_: Any,
    ) -> list[list[float]]:
        """One number for each token of each completion.

        DataError without `completion_ids`, for tokens of another tokenizer, for episodes of several
        turns, and for texts that exceed the model's context.
        """
        if completion_ids is None:
            raise DataError(
                "rewards.rewriter: it rewards tokens, and here only texts are scored; name a reward "
                "that scores texts"
            )
        contexts = [
            self._context(prompt, completion, ids)
            for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True)
        ]
        return [
            rewrite_rewards(flags)
            for flags in self.agreement(contexts, [*map(list, completion_ids)])
        ]

    def _context(self, prompt: Text, completion: Text, ids: Sequence[int]) -> list[int]:
        """The tokens that ask for a rewrite of the completion, which is `ids` in the policy's."""
        if not isinstance(completion, str) and len(completion) != 1:
            raise DataError(
                f"rewards.rewriter: it rewrites single answers, and this completion has "
                f"{len(completion)} turns"
            )
        text = completion if isinstance(completion, str) else str(completion[0]["content"])
        read = decode(self.tokenizer, torch.tensor(list(ids), dtype=torch.int64))
        if read.strip() != text.strip():
            raise DataError(
                f"rewards.rewriter: its tokenizer reads {read[:40]!r} where the policy has written "
                f"{text[:40]!r}; the rewriter needs the policy's tokenizer"
            )

        asked = asked_to_rewrite(prompt, completion, self.ask)
        if isinstance(asked, str):
            return list(self.tokenizer(asked)["input_ids"])
        return self.template.ids(asked, prompt=True)

    @torch.no_grad()
    def agreement(
        self, contexts: Sequence[list[int]], answers: Sequence[list[int]]
    ) -> list[list[bool]]:
        """Whether each token of each answer is the likeliest one behind its context and the answer's
        tokens before it.
        """
        rows = [self.within_context(context + answer) for context, answer in zip(contexts, answers)]
        agreed: list[list[bool]] = [[] for _ in rows]
        for batch in self._batches(rows):
            likeliest = self._forward([rows[row] for row in batch]).cpu()
            for place, row in enumerate(batch):
                # What is predicted for a token stands one place before it.
                first = len(contexts[row]) - 1
                predicted = likeliest[place, first : first + len(answers[row])].tolist()
                agreed[row] = [one == other for one, other in zip(predicted, answers[row])]
        return agreed

    def _forward(self, rows: list[list[int]]) -> Tensor:
        """The likeliest next token [B, T] at every token of the rows, longest row first."""
        device = next(self.model.parameters()).device
        width = len(rows[0])
        lengths = torch.tensor([len(row) for row in rows], device=device)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        mask = (torch.arange(width, device=device) < lengths[:, None]).long()
        likeliest: Tensor = self.model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
        return likeliest
