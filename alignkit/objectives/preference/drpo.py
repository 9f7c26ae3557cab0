"""DRPO: a win rate estimated from labels and from a judge at once, right where one of the two is."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from alignkit.batches import Draw, LossTerms, PairBatch, Plan, Term
from alignkit.kl import importance
from alignkit.objectives.base import Objective, PairObjective
from alignkit.objectives.preference.hypo import sampled_kl_loss
from alignkit.tensors import check_same_shape


def drpo_loss(
    policy_logps: Tensor, reference_logps: Tensor, wins: Tensor, judged: Tensor, *, clip: float
) -> Tensor:
    """-stopped(clip(pi/ref, 1/clip, clip) (wins - judged)) log pi: a labelled response's part of
    the loss, [B] x 4 -> [B].

    `wins` is 1 where the label prefers the response, else 0; `judged` is the judge's probability of
    that.
    """
    check_same_shape(
        policy_logps=policy_logps, reference_logps=reference_logps, wins=wins, judged=judged
    )
    ratio = importance(policy_logps, reference_logps).clamp(1 / clip, clip)
    return -(ratio * (wins - judged)).detach() * policy_logps


class DRPO(PairObjective):
    """Doubly robust preference optimisation (Xu et al. 2025, arXiv:2506.01183): maximises how often
    the policy beats the data, minus beta KL(policy || reference).

    The judge says how often the policy's own completions win; the labels correct it on the data,
    reweighted to the policy. The gradient is right if the judge is, or if the data are samples of
    the reference (and no ratio is clipped). Unlike the published code both responses of a pair are
    used, in either order, and the KL has its true gradient.
    """

    paper: ClassVar[str] = "Xu et al. 2025, arXiv:2506.01183"
    equation: ClassVar[str] = (
        "grad L = -E clip(pi/ref(a)) (1[a wins] - g(a, b)) grad log pi(a) - E_(y ~ pi) (g(y, b) - 1/2) grad log pi(y) "
        "+ beta grad KL(pi || ref), (a, b) the pair in either order"
    )

    beta: NonNegativeFloat = Field(0.1, description="weight of KL(policy || reference)")
    clip: Annotated[float, Field(gt=1)] = Field(
        10.0, description="ratios count as at most this, and at least its inverse"
    )
    samples: PositiveInt = Field(2, description="completions drawn per prompt and step")

    @property
    def plan(self) -> Plan:
        return Plan("pair", samples=(Draw(self.samples),), feedback="table")

    @property
    def surrogate(self) -> bool:
        return True

    def loss(self, batch: PairBatch) -> LossTerms:
        chosen, rejected, *reference = batch.sequence_logps()
        wins = chosen.new_ones(len(chosen))

        # Held-out pairs are not judged.
        judged = chosen.new_full((len(chosen),), 0.5)
        if batch.table is not None:
            judged = batch.table[:, 0, 1].to(chosen)
        better = drpo_loss(chosen, reference[0], wins, judged, clip=self.clip)
        worse = drpo_loss(rejected, reference[1], 1 - wins, 1 - judged, clip=self.clip)

        terms = batch.rows("labels", (better + worse) / 2)
        if batch.sampled is None or batch.table is None:
            return terms
        own, anchor = (
            batch.sampled.sequence(name).view(-1, self.samples) for name in ("policy", "reference")
        )
        win_rate = batch.table[:, 2:, :2].mean(-1).to(own)  # against the data, [B, S]
        judgement = -((win_rate - 0.5) * own).mean(-1)
        kl = Term("kl", sampled_kl_loss(own, anchor), weight=self.beta)
        metrics = {
            "rewards/probabilities": win_rate,
            "kl/policy_reference_k1": (own - anchor).detach(),
        }
        return terms + LossTerms([Term("judge", judgement), kl], metrics)

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(samples=1, clip=2.0)]
