"""Dr. GRPO: GRPO without the two divisions that bias it, by the group's standard deviation and by
the completion's length.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, NonNegativeFloat, PositiveInt

from alignkit.objectives.base import Objective
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.rollout_base import Aggregation


class DrGRPO(GRPO):
    """Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): with beta 0 the expected first gradient is that
    of E[score], rescaled.
    """

    paper: ClassVar[str] = "Liu et al. 2025, arXiv:2503.20783"
    equation: ClassVar[str] = (
        "L = sum_t max(-w A, -clip(w) A) / length per completion; A = score - group mean"
    )

    beta: NonNegativeFloat = Field(
        0.0, description="strength of the KL to the reference, in the loss; 0 = no reference"
    )
    scale_by_std: bool = Field(
        False, description="divide by the group's standard deviation, as GRPO does"
    )
    aggregation: Aggregation = Field(
        "constant", description="constant: every completion is divided by `length` alike"
    )
    length: PositiveInt | None = Field(64, description="the divisor: rollout.max_new_tokens")

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(beta=0.1, length=4, clip_low=0.6, clip_high=1.0, dual_clip=3.0)]

    @classmethod
    def limits(cls) -> Sequence[tuple[Objective, Objective]]:
        plain = {"beta": 0.0, "aggregation": "sequence_sum"}
        return [
            (cls(length=1, scale_by_std=True), GRPO(**plain)),
            (cls(length=1), GRPO(scale_by_std=False, **plain)),
        ]
