"""Log-probs of the completions of many bundles, in one tensor."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from alignkit.batches import Bundle


class FlatLogps:
    """One list of log-probs for each of some bundles, K x [T_k], all of them one behind the other in
    float32. A tensor for each completion would take many times its numbers, and, lying between the
    buffers of the forwards, keep their memory from being used again.
    """

    def __init__(self, bundles: Sequence[Bundle]) -> None:
        lengths: list[int] = []
        firsts = [0]  # of the completions of each bundle
        for bundle in bundles:
            lengths += map(len, bundle.completions)
            firsts.append(len(lengths))

        self.firsts = np.array(firsts)
        self.ends = np.cumsum([0, *lengths])
        self.values = torch.zeros(int(self.ends[-1]))

    def __setitem__(self, place: int, logps: Sequence[Tensor]) -> None:
        for own, given in zip(self[place], logps, strict=True):
            own.copy_(given)

    def __getitem__(self, place: int) -> list[Tensor]:
        first, end = self.firsts[place : place + 2]
        begins = self.ends[first:end].tolist()
        ends = self.ends[first + 1 : end + 1].tolist()
        return [self.values[begin:stop] for begin, stop in zip(begins, ends)]
