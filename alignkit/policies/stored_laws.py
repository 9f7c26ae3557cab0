"""A teacher's most likely tokens at each position, stored with the bundles: what statistics compare
where the whole law would be too much to keep.

The tokens that are left out are one further bucket, so that both laws still sum to 1: a divergence
of them is never negative, and at most that of the whole laws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from alignkit.batches import Bundle
from alignkit.policies.head import cut
from alignkit.policies.layout import Rows

# Names in `Bundle.tokens`, K x [T_k, k] and K x [T_k, k + 1]; the label's log-prob is in "teacher".
IDS = "teacher_ids"
LOGPROBS = "teacher_logprobs"
LABELS = "teacher"


def top_law(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Log-probs of the tokens `ids` and, last, of all others together: [C, V], [C, k] -> [C, k + 1].

    The others are summed themselves: 1 minus the rest would lose all digits where they are few.
    """
    others = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, ids), others], -1)


@dataclass(frozen=True)
class StoredLaws:
    """Stands where an anchor's hidden states would, for M trained tokens."""

    ids: Tensor  # [M, k] int64
    logprobs: Tensor  # [M, k + 1], the last one of all other tokens together
    label_logps: Tensor  # [M]
    vocabulary: int | None = None  # how many tokens policy and teacher share; None: all

    @classmethod
    def of(
        cls, bundles: Sequence[Bundle], rows: Rows, vocabulary: int | None = None
    ) -> "StoredLaws":
        """What the bundles hold, in the order of the rows' trained tokens."""

        def flat(name: str) -> Tensor:
            values = [v for bundle in bundles for v in bundle.tokens[name]]
            length = rows.shape[1]
            padding = [(0, 0) * (v.dim() - 1) + (0, length - len(v)) for v in values]
            padded = torch.stack([pad(v, sizes) for v, sizes in zip(values, padding)])
            return padded.flatten(0, 1).to(rows.targets.device)[rows.targets]

        return cls(flat(IDS).long(), flat(LOGPROBS), flat(LABELS), vocabulary)

    def compared(
        self, part: slice, logprobs: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `alignkit.policies.head.AnchorStates.compared`; the laws have k + 1 outcomes, and a
        label that is not among the stored tokens is the last one.
        """
        ids = self.ids[part]
        same = ids == labels[:, None]
        outcomes = torch.where(same.any(-1), same.long().argmax(-1), ids.shape[-1])
        theirs = self.logprobs[part].to(logprobs.dtype)
        logprobs = cut(logprobs, self.vocabulary)
        return top_law(logprobs, ids), theirs, outcomes, self.label_logps[part]
