"""RSPO: SPPO with a divergence to the reference."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, NonNegativeFloat
from torch import Tensor

from alignkit.batches import Draw, GameBatch, LossTerms, Plan, Term
from alignkit.kl import importance, k3_forward, k3_weighted
from alignkit.objectives.base import Objective
from alignkit.objectives.self_play.sppo import SPPO
from alignkit.tensors import check_same_shape


def divergence_loss(
    policy_logps: Tensor,
    target_logps: Tensor,
    reference_logps: Tensor,
    *,
    reverse_kl: float,
    forward_kl: float,
    chi2: float,
) -> Tensor:
    """Weighted sum of divergences of policy and reference, one estimate per completion of the
    target: [B] x 3 -> [B].

    reverse_kl: KL(policy || ref), forward_kl: KL(ref || policy), chi2: E_ref (policy / ref - 1)^2.
    Each is the mean over the target of f(policy / ref) ref / target with f(1) = f'(1) = 0, unbiased
    in value and gradient.
    """
    check_same_shape(
        policy_logps=policy_logps, target_logps=target_logps, reference_logps=reference_logps
    )
    target_logps = target_logps.detach()
    reference_logps = reference_logps.detach()
    log_ratio = policy_logps - reference_logps
    weight = importance(reference_logps, target_logps)
    reverse = k3_weighted(log_ratio, policy_logps - target_logps)
    squared = (importance(policy_logps, reference_logps) - 1) ** 2
    return reverse_kl * reverse + weight * (forward_kl * k3_forward(log_ratio) + chi2 * squared)


class RSPO(SPPO):
    """Regularised self-play policy optimisation (Tang et al. 2025, arXiv:2503.00030): `sppo` plus
    weighted divergences to the reference, any combination of the three.

    With the reverse KL alone, and the target following the policy, it comes to rest at the
    equilibrium with beta = reverse_kl / (2 step). That the last iterate converges is the paper's
    claim and disputed.
    """

    paper: ClassVar[str] = "Tang et al. 2025, arXiv:2503.00030"
    equation: ClassVar[str] = (
        "L = (log pi/target(y) - step (mean over y' of P(y > y') - 1/2))^2 "
        "+ reverse_kl KL(pi || ref) + forward_kl KL(ref || pi) + chi2 E_ref (pi/ref - 1)^2, y, y' ~ target"
    )

    reverse_kl: NonNegativeFloat = Field(0.2, description="weight of KL(policy || reference)")
    forward_kl: NonNegativeFloat = Field(0.0, description="weight of KL(reference || policy)")
    chi2: NonNegativeFloat = Field(
        0.0, description="weight of the squared distance of policy / reference from 1"
    )

    @property
    def plan(self) -> Plan:
        return Plan(
            "game",
            anchors=("reference", "target"),
            samples=(Draw(source="target"),),
            feedback="table",
        )

    def loss(self, batch: GameBatch) -> LossTerms:
        weights = {"reverse_kl": self.reverse_kl, "forward_kl": self.forward_kl, "chi2": self.chi2}
        terms = []
        for tokens in batch.completions:
            policy, target, reference = (
                tokens.sequence(name) for name in ("policy", "target", "reference")
            )
            losses = divergence_loss(policy, target, reference, **weights)
            terms.append(Term("divergence", losses, weight=1 / len(batch.completions)))
        return super().loss(batch) + LossTerms(terms)

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(reverse_kl=0.0, forward_kl=0.3), cls(reverse_kl=0.1, chi2=0.2)]
