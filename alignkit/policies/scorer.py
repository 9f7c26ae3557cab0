"""Training a model that gives a few numbers for a whole completion: reward and preference models
behind the loop's one door.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.batches import Bundle, Plan, TokenLogps
from alignkit.errors import DataError
from alignkit.policies.module import context_length
from alignkit.policies.pair import PolicyPair


class ScoreModule(nn.Module):
    """A sequence-classification model of D outputs, read at the last token of a row."""

    packing = None  # one row per text

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Right-padded rows [N, L] x 2 -> outputs [N, D] in float32."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()


class ScorePair(PolicyPair):
    """What the loop asks for log-probs, for objectives that learn from a whole completion's outputs
    (`plan.outputs`).
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, save_config: Mapping[str, object] | None = None
    ) -> None:
        module: Any = ScoreModule(model)
        super().__init__(module, tokenizer, {}, layout="padded", save_config=save_config)
        self.pad = model.config.get_text_config().pad_token_id
        self.longest = context_length(model)

    def logps(self, bundles: Sequence[Bundle], plan: Plan, *, anchors: bool = True) -> TokenLogps:
        """`policy` [N, D] holds the outputs of the N completions. DataError where a row exceeds the
        model's context.
        """
        rows = [torch.cat([bundle.prompt, ids]) for bundle in bundles for ids in bundle.completions]
        lengths = torch.tensor([len(row) for row in rows])
        if int(lengths.max()) > self.longest:
            raise DataError(
                f"a row has {int(lengths.max())} tokens, the model reads at most {self.longest}; lower data.max_length to it"
                + (" (both completions of a pair are read at once)" if plan.joined else "")
            )
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
        seen = torch.arange(ids.shape[1]) < lengths[:, None]
        self.module.train(torch.is_grad_enabled())
        outputs = self.module(ids.to(self.device), seen.long().to(self.device))
        return TokenLogps(outputs, {}, torch.ones_like(outputs, dtype=torch.bool))


def joined(bundle: Bundle, separator: int) -> Bundle:
    """A pair as two texts that hold both completions: first | separator | second, and the same in
    the other order.
    """
    first, second = bundle.completions
    between = torch.tensor([separator])
    both = [torch.cat([a, between, b]) for a, b in ((first, second), (second, first))]
    return Bundle(
        bundle.prompt,
        both,
        [torch.ones(len(ids), dtype=torch.bool) for ids in both],
        bundle.uid,
        bundle.rows,
    )


def separator_of(tokenizer: Any) -> int:
    """The token between two completions: the tokenizer's own separator, else its end token."""
    tokens = (tokenizer.sep_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next(token for token in tokens if token is not None)
