"""Reward and preference models: networks that read a whole completion and give a few numbers.

A `Scorer` gives `Outputs` where a policy gives log-probs. `TrainedScorer` is the one that the loop
trains; it is loaded by `alignkit.policies.load_scorer`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alignkit.batches import Bundle, Outputs, Plan, TokenLogps
from alignkit.errors import DataError, ModelError
from alignkit.policies.module import context_length, position_table
from alignkit.policies.pair import PolicyPair


class Scorer(Protocol):
    """Whatever gives D numbers for each completion."""

    def scores(self, bundles: Sequence[Bundle]) -> Outputs:
        """Outputs [N, D] of the N completions of `bundles`, with gradient iff it is enabled."""
        ...

    def micro_batches(self, bundles: Sequence[Bundle], budget: int) -> list[list[int]]:
        """Indices of the bundles of each forward of at most `budget` tokens."""
        ...


class ScoreModule(nn.Module):
    """A sequence-classification model of D outputs, read at the last token of a row."""

    packing = None  # one row per text
    bin_head = None  # the law of a reward is a head of policies
    rewards = False  # and so is a head of rewards beside a language model

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Right-padded rows [N, L] x 2 -> outputs [N, D] in float32."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits.float()

    def touch(self) -> None:
        """A forward of one token, of which nothing is used."""
        ids = torch.ones((1, 1), dtype=torch.int64, device=next(self.parameters()).device)
        self(ids, torch.ones_like(ids))


class TrainedScorer(PolicyPair):
    """The scorer that is trained, for objectives that learn from outputs (`plan.outputs`).

    It is spread over processes, checkpointed and saved as a policy is, but has no anchors and no
    log-probs.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        save_config: Mapping[str, object] | None = None,
        save_dtype: torch.dtype | None = None,
    ) -> None:
        module: Any = ScoreModule(model)
        super().__init__(
            module,
            tokenizer,
            {},
            layout="padded",
            save_config=save_config,
            save_dtype=save_dtype,
        )
        self.pad = model.config.get_text_config().pad_token_id
        self.longest = position_table(model) or context_length(model)

    def scores(self, bundles: Sequence[Bundle]) -> Outputs:
        """Outputs [N, D] of the N completions of `bundles`, with gradient iff it is enabled.

        Raises DataError where prompt and completion exceed the model's context.
        """
        rows = [torch.cat([bundle.prompt, ids]) for bundle in bundles for ids in bundle.completions]
        lengths = torch.tensor([len(row) for row in rows])
        longest = int(lengths.max())
        if longest > self.longest:
            raise DataError(
                f"a row has {longest} tokens, the model reads at most {self.longest}; lower "
                "data.max_length to it (a classifier of preference pairs reads both completions "
                "at once)"
            )

        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
        seen = torch.arange(ids.shape[1]) < lengths[:, None]
        self.module.train(torch.is_grad_enabled())
        return Outputs(self.module(ids.to(self.device), seen.long().to(self.device)))

    def forward(self, bundles: Sequence[Bundle], plan: Plan) -> Outputs:
        """What the objective of `plan` sees of the completions: their `scores`."""
        return self.scores(bundles)

    def logps(self, bundles: Sequence[Bundle], plan: Plan, *, anchors: bool = True) -> TokenLogps:
        """Raises ModelError: a scorer has no log-probs."""
        raise ModelError("a reward or preference model gives scores, it has no log-probs")


def joined(bundle: Bundle, separator: int) -> Bundle:
    """A preference pair as two texts that each hold both completions: first | separator | second,
    and the same in the other order.
    """
    first, second = bundle.completions
    between = torch.tensor([separator])
    texts = [torch.cat([first, between, second]), torch.cat([second, between, first])]
    masks = [torch.ones(len(ids), dtype=torch.bool) for ids in texts]
    return Bundle(bundle.prompt, texts, masks, bundle.uid, bundle.rows)


def separator_of(tokenizer: Any) -> int:
    """The token between two completions: the tokenizer's own separator, else its end token."""
    for token in (tokenizer.sep_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    raise ModelError("the tokenizer has no separator, end or padding token; add one and save it")
