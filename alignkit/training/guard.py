"""The finite guard: a step whose log-probs, loss or gradient are not finite on any rank ends on all
of them, with names.
"""

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from alignkit.batches import Bundle, LossTerms, Outputs, TokenLogps
from alignkit.errors import NumericsError
from alignkit.policies.dtensors import local

NAMED = 8  # findings that a message lists


class BrokenStep(NumericsError):
    """An optimiser step that is not finite.

    Raised on every rank in the same step; nothing was updated.
    """


class Guard:
    """Watches one optimiser step of this rank. Watching waits for no device: `broken` joins the
    step's own reduction.
    """

    def __init__(self, device: torch.device):
        # rows that are not finite
        self.broken = torch.zeros((), device=device, dtype=torch.float64)
        self._seen: list[tuple[str, Tensor, Sequence[Bundle]]] = []

    def watch_logps(self, tokens: TokenLogps, bundles: Sequence[Bundle]) -> None:
        """Log-probs of the policy, the sampler and the anchors: an
        infinite one can hide behind a finite loss.
        """
        named = {"policy": tokens.policy, "behavior": tokens.behavior, **tokens.anchors}
        for name, values in named.items():
            if values is not None:
                self._watch(f"log-probs of `{name}` are", values, bundles)

    def watch_outputs(self, outputs: Outputs, bundles: Sequence[Bundle]) -> None:
        """Outputs of a reward or preference model."""
        self._watch("outputs of the model are", outputs.values, bundles)

    def watch_terms(self, out: LossTerms, bundles: Sequence[Bundle]) -> None:
        """Values of the loss terms."""
        for term in out.terms:
            self._watch(f"term `{term.name}` is", term.values, bundles)

    def _watch(self, name: str, values: Tensor, bundles: Sequence[Bundle]) -> None:
        bad = ~values.detach().isfinite()
        bad = bad.flatten(1).any(-1) if bad.dim() > 1 else bad.reshape(-1)
        self.broken += bad.sum()
        self._seen.append((name, bad, bundles))

    def check(self, loss: float, norm: float, broken: float, accelerator: Accelerator) -> None:
        """BrokenStep, naming terms and rows, unless everything is finite. The figures are global,
        so all ranks agree.
        """
        if not broken and math.isfinite(loss) and math.isfinite(norm):
            return
        rank = f"rank {accelerator.process_index}: " if accelerator.num_processes > 1 else ""
        broken_rows = gather_object([f"{rank}{line}" for line in self._lines()])
        where = (
            "; ".join(broken_rows[:NAMED]) or "no row's own loss is broken: the gradient overflowed"
        )
        if len(broken_rows) > NAMED:
            where += f" and {len(broken_rows) - NAMED} more"
        raise BrokenStep(
            f"loss {loss}, gradient norm {norm}: {where}. "
            "Nothing was updated; lower train.learning_rate or check these rows"
        )

    def _lines(self) -> list[str]:
        lines = [
            f"{name} not finite at row {_owner(bundles, len(bad), row)}"
            for name, bad, bundles in self._seen
            for row in bad.nonzero()[:, 0].tolist()
        ]
        return list(dict.fromkeys(lines))


def broken_weights(module: nn.Module) -> list[str]:
    """Names of trainable parameters of which this process's part is not finite."""
    return [
        name
        for name, p in module.named_parameters()
        if p.requires_grad and not local(p.detach()).isfinite().all()
    ]


def _owner(bundles: Sequence[Bundle], rows: int, row: int) -> str:
    """The uid of the bundle that a row of [rows] values comes from: one value per bundle, per
    trained one, or per completion.
    """
    matched = [b for b in bundles if not b.mismatched]
    owners = next(
        (o for o in (bundles, matched) if len(o) == rows),
        [b for b in bundles for _ in b.completions],
    )
    return owners[row * len(owners) // rows].uid or str(row)
