"""Rows of log-probs from several batches or processes under one another, padded to one length."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import pad

from alignkit.batches import TokenLogps


def gather_rows(mine: TokenLogps, accelerator: Accelerator) -> tuple[TokenLogps, int]:
    """Every rank's rows in the order of the ranks, and the index at which this rank's rows begin.

    Ranks may have different numbers of rows and different lengths. The result carries no gradient.
    """
    if accelerator.num_processes == 1:
        return mine, 0
    device = mine.policy.device
    sizes = accelerator.gather(torch.tensor([mine.policy.shape], device=device))  # [world, 2]
    most_rows, length = sizes.max(0).values.tolist()

    # Collectives need equal shapes, so every rank pads to the largest, and the pads are dropped
    # afterwards.
    missing_columns = length - mine.policy.shape[1]
    missing_rows = most_rows - mine.policy.shape[0]
    padded = mine.map(lambda t: pad(t, (0, missing_columns, 0, missing_rows)))
    real = torch.cat([torch.arange(most_rows) < count for count in sizes[:, 0].cpu()])
    real_rows = real.nonzero()[:, 0].to(device)

    everyone = padded.map(lambda t: accelerator.gather(t.contiguous())[real_rows])
    return everyone, int(sizes[: accelerator.process_index, 0].sum())


def concat(parts: Sequence[TokenLogps]) -> TokenLogps:
    """The rows of several batches under one another, padded to the longest.

    All parts must have the same anchors and extras, and behaviour log-probs all or none of them.
    """
    length = max(part.policy.shape[1] for part in parts)
    padded = [part.map(lambda t: pad(t, (0, length - t.shape[1]))) for part in parts]

    def stacked(name: str) -> Tensor:
        return torch.cat([part.get(name) for part in padded])

    first = padded[0]
    return TokenLogps(
        policy=stacked("policy"),
        anchors={name: stacked(name) for name in first.anchors},
        mask=torch.cat([part.mask for part in padded]),
        behavior=None if first.behavior is None else stacked("behavior"),
        extras={name: stacked(name) for name in first.extras},
    )
