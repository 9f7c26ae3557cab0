"""Which rows of fixed data learn from an answer of the policy's own, and from which one: a fresh
sample, or one of the last ones, kept for a while.

The share of own answers may grow when the held-out loss rises. Ko et al. 2024, arXiv:2402.03898,
section 3.2: adaptive off-policy distillation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Bundle, Draw
from alignkit.rollout.noise import row_keys, uniform
from alignkit.sources.bundle_io import pack, unpack

GIVEN, FRESH, REPLAYED = range(3)

# Stands for completion and position in the noise that chooses rows, which no sampled token has.
NO_COMPLETION = -1


class OwnAnswers:
    """The own answers of one draw with a `share`: how many rows have one, and the last of them.

    Everything follows from the seed, the positions of rows in the order and what the held-out loss
    was, so that it is the same for any number of processes.
    """

    def __init__(self, draw: Draw, *, seed: int, batch_size: int, steps: int):
        assert draw.share is not None  # the caller looked
        self.draw = draw
        self.share = draw.share
        self.seed = seed
        self.steps = steps  # of the whole run

        # The held-out loss that the next one is compared with; None before the first.
        self.loss: float | None = None

        # Rows with an own answer, the oldest first. They are read once there is a batch of them: a
        # few would come back in every step.
        self.kept: list[Bundle] = []
        self.enough = min(batch_size, draw.adaptive.replay)

    def choices(self, positions: Sequence[int], clock: int, step: int) -> tuple[Tensor, Tensor]:
        """GIVEN, FRESH or REPLAYED for each of the rows at these positions of the order, and which of
        the kept rows takes its place where it is replayed: [R] int64 each.

        A row has an own answer with probability `share`; a share step / steps of these is replayed.
        """
        nothing = torch.full((len(positions),), NO_COMPLETION)
        keys = row_keys(self.seed, clock, torch.tensor(positions), nothing, nothing)
        coin, place = uniform(keys, 2).T

        replays = self.draw.adaptive.replay > 0 and len(self.kept) >= self.enough
        fresh = self.share * (1 - step / self.steps) if replays else self.share
        kinds = torch.full_like(keys, GIVEN)
        kinds[coin < self.share] = REPLAYED
        kinds[coin < fresh] = FRESH
        return kinds, (place * len(self.kept)).long()

    def keep(self, bundles: Sequence[Bundle]) -> None:
        """Put new rows with own answers, of all processes, behind the others; the oldest leave."""
        capacity = self.draw.adaptive.replay
        self.kept = [*self.kept, *bundles][-capacity:] if capacity else []

    def evaluated(self, loss: float) -> None:
        """The held-out loss of an evaluation. One that is `tolerance` or more above the last one that
        it is compared with lets the share grow, and is compared with from then on.
        """
        adaptive = self.draw.adaptive
        if self.loss is None:
            self.loss = loss
        elif loss >= self.loss + adaptive.tolerance:
            self.share = min(1.0, self.share + adaptive.growth)
            self.loss = loss

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint needs to go on: tensors and JSON."""
        tensors, shapes = pack(self.kept)
        return tensors, {"share": self.share, "loss": self.loss, "kept": shapes}

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Put back what `state` returned."""
        self.share = state["share"]
        self.loss = state["loss"]
        self.kept = unpack(tensors, state["kept"])
