"""HyPO: DPO on offline pairs and the reverse KL on the
policy's own completions, drawn in every step.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from alignkit.batches import Draw, LossTerms, PairBatch, Plan, Term
from alignkit.objectives.base import Objective, PairObjective
from alignkit.objectives.preference.dpo import DPO, dpo_loss
from alignkit.tensors import check_same_shape


def sampled_kl_loss(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Mean over S samples of the policy of stopped(log-ratio - baseline) * log pi, log-prob sums:
    [B, S] x 2 -> [B].

    Its mean gradient is that of KL(policy || reference); its value means nothing. The baseline is
    the other samples' mean log-ratio (none for S = 1).
    """
    check_same_shape(policy_logps=policy_logps, reference_logps=reference_logps)
    ratio = (policy_logps - reference_logps).detach()
    others = (ratio.sum(-1, keepdim=True) - ratio) / max(ratio.shape[-1] - 1, 1)
    return ((ratio - others) * policy_logps).mean(-1)


class HyPO(PairObjective):
    """Hybrid preference optimisation (Song et al. 2024, arXiv:2406.01462). Offline pairs need not
    cover what the policy drifts to; the KL on its own samples does. Another method of this name
    (arXiv:2602.11902) is something else.
    """

    paper: ClassVar[str] = "Song et al. 2024, arXiv:2406.01462"
    equation: ClassVar[str] = "L = DPO(w, l) + kl_weight * E_{y ~ pi} stopped(log pi/ref) log pi(y)"

    beta: PositiveFloat = Field(0.1, description="strength of the KL that the pairs imply")
    kl_weight: NonNegativeFloat = Field(
        0.01, description="weight of the reverse KL on the policy's own completions"
    )
    samples: PositiveInt = Field(2, description="completions drawn per prompt and step")

    @property
    def plan(self) -> Plan:
        return Plan("pair", samples=(Draw(self.samples),))

    @property
    def surrogate(self) -> bool:
        return True

    def loss(self, batch: PairBatch) -> LossTerms:
        terms = batch.rows(
            "hypo", dpo_loss(*batch.sequence_logps(), beta=self.beta), scale=self.beta
        )
        if batch.sampled is None:  # held-out pairs: nothing is drawn
            return terms
        logps = [
            batch.sampled.sequence(name).view(-1, self.samples) for name in ("policy", "reference")
        ]
        estimate = (logps[0] - logps[1]).detach()
        return terms + LossTerms(
            [Term("kl", sampled_kl_loss(*logps), weight=self.kl_weight)],
            {"kl/policy_reference_k1": estimate},
        )

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(samples=1, kl_weight=0.3)]

    @classmethod
    def limits(cls) -> Sequence[tuple[Objective, Objective]]:
        return [(cls(kl_weight=0.0), _WithSamples())]


class _WithSamples(DPO):
    """DPO on a batch that holds samples as well."""

    @property
    def plan(self) -> Plan:
        return HyPO().plan
