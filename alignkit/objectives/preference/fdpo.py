"""f-DPO: direct preference optimisation under other divergences than the reverse KL."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit import divergences
from alignkit.batches import LossTerms, PairBatch
from alignkit.divergences import Divergence
from alignkit.errors import ConfigError
from alignkit.objectives.base import Objective
from alignkit.objectives.preference.dpo import DPO
from alignkit.objectives.preference.weighting import WeighablePairs
from alignkit.tensors import pair_log_ratios


def fdpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    divergence: str | Divergence,
) -> Tensor:
    """f-DPO loss per pair: [B] x 4 -> [B]. `divergence` is a name or what
    `alignkit.divergences.get` returns; ConfigError if it is unknown or not admissible. Finite for
    log-ratios up to 1e4 (see `alignkit.divergences`).

    Wang et al. 2023, arXiv:2309.16240.
    """
    chosen, rejected = pair_log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    if isinstance(divergence, str):
        divergence = divergences.get(divergence)
    else:
        divergence.check_admissible()
    return -logsigmoid(beta * (divergence.f_prime(chosen) - divergence.f_prime(rejected)))


class FDPO(WeighablePairs):
    """f-DPO (Wang et al. 2023, arXiv:2309.16240)."""

    paper: ClassVar[str] = "Wang et al. 2023, arXiv:2309.16240"
    equation: ClassVar[str] = "L = -log sigmoid(beta * [f'(pi(w)/ref(w)) - f'(pi(l)/ref(l))])"

    beta: PositiveFloat = Field(0.1, description="strength of the divergence to the reference")
    divergence: str = Field(
        "jensen_shannon", description=f"one of {', '.join(divergences.names())}, or one registered"
    )
    alpha: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="of the alpha divergence alone: 0 is the reverse, 1 the forward KL; default 0.5",
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.alpha is not None and self.divergence != "alpha":
            raise ConfigError(
                f"alpha belongs to divergence 'alpha', the divergence is {self.divergence!r}; leave alpha out"
            )
        self.resolved.check_admissible()
        return self

    @property
    def resolved(self) -> Divergence:
        """The divergence with its parameter."""
        parameters = {} if self.alpha is None else {"alpha": self.alpha}
        return divergences.get(self.divergence, **parameters)

    def loss(self, batch: PairBatch) -> LossTerms:
        logps = batch.sequence_logps()
        losses = fdpo_loss(*logps, beta=self.beta, divergence=self.resolved)
        chosen, rejected = (
            self.beta * self.resolved.f_prime(ratio) for ratio in pair_log_ratios(*logps)
        )
        return batch.rows("fdpo", self.weighted(losses, batch), rewards=(chosen, rejected))

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """ref * f'^-1((reward - c) / beta) with the c that normalises it."""
        return divergences.regularized_argmax(self.resolved, reward / self.beta, reference)

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        names = (
            "reverse_kl",
            "forward_kl",
            "jensen_shannon",
            "hellinger",
            "jeffreys",
            "neyman_chi2",
            "chi2_kl",
        )
        return [*(cls(divergence=name) for name in names), cls(divergence="alpha", alpha=0.3)]

    @classmethod
    def limits(cls) -> Sequence[tuple[Objective, Objective]]:
        half = cls(beta=0.1, divergence="alpha", alpha=0.5)
        return [
            (cls(divergence="reverse_kl"), DPO()),
            (half, cls(beta=0.2, divergence="hellinger")),
        ]
