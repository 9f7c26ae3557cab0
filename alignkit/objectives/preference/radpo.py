"""Ra-DPO: TDPO with a risk measure of the log-ratio in place of its mean, the KL."""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from alignkit.batches import LossTerms, PairBatch, Plan
from alignkit.errors import ConfigError
from alignkit.objectives.base import Objective
from alignkit.objectives.preference.tdpo import TDPO, tdpo_loss
from alignkit.risk import Risk, measure, risk_ratio


def radpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_risk: Tensor,
    rejected_risk: Tensor,
    *,
    beta: float,
    alpha: float | None = None,
    version: Literal[1, 2] = 1,
) -> Tensor:
    """Ra-DPO loss per pair: [B] x 6 -> [B]. `chosen_risk` and `rejected_risk` are sums over a
    response's tokens of `alignkit.risk.risk_ratio` at its prefixes; `alpha` and `version` as in
    `tdpo_loss`.

    Chen et al. 2025, arXiv:2505.20359.
    """
    logps = (
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return tdpo_loss(*logps, chosen_risk, rejected_risk, beta=beta, alpha=alpha, version=version)


def risk_statistic(
    policy_logprobs: Tensor, reference_logprobs: Tensor | None, labels: Tensor, **settings: object
) -> Tensor:
    """The plan's statistic: the risk ratio at each position, [C, V] x 2 -> [C]."""
    assert reference_logprobs is not None, "Ra-DPO's statistic needs the reference's log-probs"
    return risk_ratio(policy_logprobs, reference_logprobs.detach(), **settings)  # type: ignore[arg-type]


class RaDPO(TDPO):
    """Ra-DPO (Chen et al. 2025, arXiv:2505.20359). The risk is the upper tail's, as the paper's
    value recursion needs it.
    """

    paper: ClassVar[str] = (
        "Chen et al. 2025, arXiv:2505.20359, Ra-DPO1 (version 1) and Ra-DPO2 (version 2)"
    )
    equation: ClassVar[str] = (
        "L = -log sigmoid(beta * [r(w) - r(l) - (RR(l) - RR(w))]), RR = sum_t risk of log ref/pi at y_<t"
    )

    risk: Risk = Field("cvar", description="kl (TDPO), cvar or erm (entropic)")
    level: PositiveFloat = Field(
        0.95, description="cvar: reference mass of the tail, at most 1; erm: its mu; unused for kl"
    )
    compat: Literal["repo"] | None = Field(
        None, description="repo: what the released code computes for cvar; it is no CVaR"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.risk == "cvar" and self.level > 1:
            raise ConfigError(
                f"level is {self.level}; for cvar it is a probability mass above 0 and at most 1"
            )
        if self.compat and self.risk != "cvar":
            raise ConfigError(
                f"compat 'repo' belongs to risk 'cvar', the risk is {self.risk!r}; leave compat out"
            )
        return self

    @property
    def statistic(self) -> str:
        """The statistic's name with its settings, so that two parts of a weighted list stay apart."""
        level = "" if self.risk == "kl" else f"_{self.level:g}"
        return f"risk_{self.risk}{level}{'_repo' if self.compat else ''}"

    @property
    def plan(self) -> Plan:
        function = partial(risk_statistic, risk=self.risk, level=self.level, compat=self.compat)
        return Plan("pair", statistics={self.statistic: function})

    def loss(self, batch: PairBatch) -> LossTerms:
        return self._loss(batch, "radpo", self.statistic)

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """Of one token: ref * exp(reward / beta), normalised; none for version 2 and for the
        released code's quantile.
        """
        return None if self.compat else super().optimum(reward, reference)

    def backup(self, values: Tensor, reference: Tensor) -> Tensor | None:
        """The risk-averse value -beta * risk(-values / beta) under the reference (paper, eq. 6)."""
        if self.version != 1 or self.compat:
            return None
        return -self.beta * measure(-values / self.beta, reference, self.risk, self.level)

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [
            cls(risk="cvar", level=0.7),
            cls(risk="erm", level=0.5),
            cls(version=2),
            cls(compat="repo", level=0.7),
        ]

    @classmethod
    def limits(cls) -> Sequence[tuple[Objective, Objective]]:
        return [
            (cls(risk=r, level=1.0, version=v), TDPO(version=v))
            for r in ("kl", "cvar")
            for v in (1, 2)
        ]
