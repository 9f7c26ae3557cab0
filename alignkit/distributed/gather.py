"""Rows of log-probs from every process, in the order of the ranks."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch.nn.functional import pad

from alignkit.batches import TokenLogps


def gather_rows(mine: TokenLogps, accelerator: Accelerator) -> tuple[TokenLogps, int]:
    """Every rank's rows, rank by rank, and where this rank's rows begin."""
    if accelerator.num_processes == 1:
        return mine, 0
    device = mine.policy.device
    sizes = accelerator.gather(torch.tensor([mine.policy.shape], device=device))  # [world, 2]
    rows, length = sizes.max(0).values.tolist()
    padded = mine.map(lambda t: pad(t, (0, length - t.shape[1], 0, rows - t.shape[0])))
    keep = torch.cat([torch.arange(rows) < n for n in sizes[:, 0].cpu()]).nonzero()[:, 0].to(device)
    everyone = padded.map(lambda t: accelerator.gather(t.contiguous())[keep])
    return everyone, int(sizes[: accelerator.process_index, 0].sum())


def concat(parts: Sequence[TokenLogps]) -> TokenLogps:
    """Rows of several batches under one another, padded to the longest."""
    length = max(part.policy.shape[1] for part in parts)
    same = [part.map(lambda t: pad(t, (0, length - t.shape[1]))) for part in parts]
    first = same[0]
    return TokenLogps(
        torch.cat([p.policy for p in same]),
        {k: torch.cat([p.anchors[k] for p in same]) for k in first.anchors},
        torch.cat([p.mask for p in same]),
        None if first.behavior is None else torch.cat([p.behavior for p in same]),
        {k: torch.cat([p.extras[k] for p in same]) for k in first.extras},
    )
