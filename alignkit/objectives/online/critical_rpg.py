"""RPG with a KL that leaves critical tokens free: those at which the reference hesitates."""

import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from alignkit.batches import Plan
from alignkit.kl import Direction
from alignkit.objectives.base import Objective
from alignkit.objectives.online.rpg import RPG
from alignkit.objectives.rollout_base import Credit, exact_kl


def critical_kl(
    policy_logprobs: Tensor, anchor_logprobs: Tensor | None, labels: Tensor, *, power: float
) -> Tensor:
    """KL(policy || reference) times certainty^power per token, certainty = 1 - H(reference) / log
    V: [C, V] x 2, [C] -> [C].
    """
    kl = exact_kl(policy_logprobs, anchor_logprobs, labels)
    assert anchor_logprobs is not None
    anchor = anchor_logprobs.detach()
    entropy = -(anchor.exp() * anchor.where(anchor > -torch.inf, 0.0)).sum(-1)
    # rounding can leave it below 0
    certainty = (1 - entropy / math.log(anchor.shape[-1])).clamp(min=0.0)
    return certainty**power * kl


class CriticalRPG(RPG):
    """`rpg` with a fixed reference and the KL of critical tokens
    (Vassoyan et al. 2025, arXiv:2502.06533).

    The penalty stays where the reference knows what comes next and goes where it does not, so that
    the policy may explore there. The weight is the reference's alone: at power 0 it is 1, and the
    objective `rpg`.
    """

    paper: ClassVar[str] = "Vassoyan et al. 2025, arXiv:2502.06533"
    equation: ClassVar[str] = (
        "L = -SG(w A) log pi + beta (1 - H(ref) / log V)^power KL(pi || ref) per token"
    )
    kl_metric: ClassVar[str] = "kl/policy_reference_critical"

    anchor: Literal["reference"] = Field("reference", description="the KL is to a fixed policy")
    power: NonNegativeFloat = Field(
        150.0,
        description="how certain the reference must be for the KL to count; 0: however little",
    )

    @property
    def plan(self) -> Plan:
        return self.rollout_plan(statistics={"kl": partial(critical_kl, power=self.power)})

    @property
    def kl_gradient(self) -> tuple[Credit, Direction] | None:
        return None if self.power else super().kl_gradient

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [
            cls(power=2.0),
            cls(
                power=0.5,
                kl_credit="token",
                clip_high=1.0,
                clip_low=0.6,
                aggregation="constant",
                length=4,
            ),
        ]

    @classmethod
    def limits(cls) -> Sequence[tuple[Objective, Objective]]:
        return [(cls(power=0.0), RPG())]
