"""A-LoL: advantage-weighted likelihood of the reference's own good completions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from alignkit.batches import Draw, LossTerms, Plan, RolloutBatch
from alignkit.credit import group_advantages
from alignkit.errors import ConfigError
from alignkit.kl import importance
from alignkit.objectives.base import Objective, State
from alignkit.objectives.rollout_base import (
    Aggregation,
    RolloutObjective,
    advantages_of,
    ratio_metrics,
    spread,
)
from alignkit.tensors import check_same_shape, masked_sum

Ratio = Literal["sequence", "token", "none"]


def alol_loss(
    policy_logps: Tensor,
    behavior_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    ratio: Ratio = "sequence",
) -> Tensor:
    """-stopped clip(w, 1 - clip, 1 + clip) * max(0, A) * log pi per token: [N, T] x 4 -> [N, T], 0
    outside the mask.

    w = exp(policy - behavior) of the whole completion ("sequence"), of each token ("token"), or 1
    ("none"). Baheti et al. 2023, arXiv:2305.14718.
    """
    check_same_shape(
        policy_logps=policy_logps, behavior_logps=behavior_logps, advantages=advantages, mask=mask
    )
    if ratio not in ("sequence", "token", "none"):
        raise ConfigError(
            f"alol_loss: ratio is {ratio!r}; it must be 'sequence', 'token' or 'none'"
        )

    if ratio == "sequence":
        sums = (masked_sum(policy_logps, mask), masked_sum(behavior_logps, mask))
        w = importance(*sums).unsqueeze(-1)
    elif ratio == "token":
        w = importance(policy_logps, behavior_logps)
    else:
        w = torch.ones_like(policy_logps)

    weight = w.clamp(1 - clip, 1 + clip) * advantages.clamp(min=0)
    return torch.where(mask, -weight.detach() * policy_logps, 0.0)


class ALoL(RolloutObjective):
    """Advantage leftover lunch RL (Baheti et al. 2023, arXiv:2305.14718). The completions are the
    reference's; those that score below its mean for the prompt teach nothing. No value network: the
    mean is that of the prompt's completions.
    """

    paper: ClassVar[str] = "Baheti et al. 2023, arXiv:2305.14718"
    equation: ClassVar[str] = (
        "L = -clip(pi/ref) max(0, score - mean of ref's scores) log pi(y), y from ref"
    )

    ratio: Ratio = Field(
        "sequence",
        description="importance of a completion, of each token (A-LoL sequence), or none (ref-free)",
    )
    clip: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="the importance counts between 1 - this and 1 + this"
    )
    aggregation: Aggregation = Field(
        "sequence_sum", description="how token losses become one number: what lengths weigh"
    )

    @property
    def plan(self) -> Plan:
        return replace(self.rollout_plan(anchors=()), samples=(Draw(source="reference"),))

    @property
    def surrogate(self) -> bool:
        return True

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [
            cls(),
            cls(ratio="token", clip=0.5),
            cls(ratio="none", aggregation="constant", length=4),
        ]

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """Score minus the mean score of the prompt's completions, where positive."""
        advantages = group_advantages(rollout.scores, rollout.groups, kind="mean").clamp(min=0)
        return replace(rollout, advantages=spread(advantages, rollout.tokens)), state

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        logps = tokens.policy
        old = tokens.get("behavior")
        inputs = (logps, old, advantages_of(batch), tokens.mask)
        values = alol_loss(*inputs, clip=self.clip, ratio=self.ratio)
        metrics = ratio_metrics(tokens, importance(logps, old))
        return LossTerms([self.term("alol", values, tokens)], metrics)
