"""What the objectives that learn from a teacher share: divergences from its next-token laws, and the
names of their metrics.
"""

from functools import partial
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor

from alignkit.batches import Statistic
from alignkit.errors import ShapeError
from alignkit.objectives.base import Objective
from alignkit.objectives.vocabulary_divergences import (
    VocabularyDivergence,
    check_settings,
    distillation_loss,
    divergence_of_laws,
)

# Metrics are named as in alignkit.objectives.rollout_base: the first name is averaged over.
KL_METRICS: dict[VocabularyDivergence, str] = {
    "forward_kl": "kl/teacher_policy_exact",
    "reverse_kl": "kl/policy_teacher_exact",
}


class DivergenceObjective(Objective):
    """Learns from a divergence between the policy's and the teacher's next-token laws."""

    favours_better: ClassVar = "no preference"

    divergence: VocabularyDivergence = Field(
        "forward_kl", description="forward_kl covers the teacher's mass, reverse_kl seeks its modes"
    )
    beta: float = Field(0.5, description="jsd: the teacher's share of the mixture, within (0, 1)")
    alpha: float = Field(0.1, description="skew KLs: the skew, from 0 to below 1")
    mu: float = Field(0.5, description="akl: the mass of the head, above 0 and up to 1")
    temperature: float = Field(1.0, description="above 0; divides both models' log-probs")

    @model_validator(mode="after")
    def _settings_are_allowed(self) -> Self:
        check_settings(**self._settings)
        return self

    @property
    def _settings(self) -> dict[str, Any]:
        return self.model_dump(include={"divergence", "beta", "alpha", "mu", "temperature"})

    @property
    def statistic(self) -> Statistic:
        """The divergence at each token, as a statistic of the plan."""
        return teacher_statistic(**self._settings)

    @property
    def surrogate_statistics(self) -> tuple[str, ...]:
        """The weights of `akl` have no gradient."""
        return ("divergence",) if self.divergence == "akl" else ()

    @property
    def metric(self) -> str:
        """The name under which the mean of the divergence per token, in nats, is logged."""
        return KL_METRICS.get(self.divergence, f"divergence/{self.divergence}")


def teacher_statistic(**settings: Any) -> Statistic:
    """The plan's statistic that `distillation_loss` with `settings` makes: log-probs of policy and
    teacher [C, V] and labels [C] -> [C].
    """
    return partial(_divergence, **settings)


def teacher_law(teacher_logprobs: Tensor | None) -> Tensor:
    """The teacher's log-probs [C, V]. ShapeError where the statistic was given none."""
    if teacher_logprobs is None:
        raise ShapeError("the teacher's log-probs over the vocabulary were not given")
    return teacher_logprobs


def _divergence(
    policy_logprobs: Tensor,
    teacher_logprobs: Tensor | None,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    **settings: Any,
) -> Tensor:
    teacher = teacher_law(teacher_logprobs)
    if temperature != 1:
        return distillation_loss(policy_logprobs, teacher, temperature=temperature, **settings)

    # The head's laws are normalised already; temperature 1 leaves them so.
    divergence = settings.pop("divergence", "forward_kl")
    return divergence_of_laws(
        policy_logprobs, teacher.detach().to(policy_logprobs.dtype), divergence, **settings
    )
