"""Base classes of objectives: frozen pydantic models around pure loss functions.

An objective sees tensors only: no model, no tokenizer, no device, no recipe.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from alignkit.batches import FAMILIES, Batch, LossTerms, RolloutBatch
from alignkit.errors import ConfigError, ShapeError
from alignkit.kl import exact
from alignkit.plan import Family, Plan, combined

State = dict[str, Tensor]


class Objective(BaseModel):
    """One loss with its hyper-parameters. Subclasses give `plan` and `loss`; the rest has defaults."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        arbitrary_types_allowed=True,
    )

    paper: ClassVar[str] = ""  # "Rafailov et al. 2023, arXiv:2305.18290, eq. 7"
    equation: ClassVar[str] = ""  # the loss in one line of plain maths, for the model card

    # Where a step of descent favours the better completion, for `alignkit verify`: everywhere; near
    # the reference (the loss is bounded, so that its gradient vanishes far from it); not everywhere
    # (the published loss moves the wrong way somewhere, as the docstring then says); or there is no
    # better completion, since the objective imitates a teacher's law.
    favours_better: ClassVar[Literal["always", "near", "not everywhere", "no preference"]] = (
        "always"
    )

    @property
    def plan(self) -> Plan:
        """What the loop has to provide."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> LossTerms:
        """Unreduced loss terms of a batch of the plan's family."""
        raise NotImplementedError

    @property
    def surrogate(self) -> bool:
        """Whether the loss stops gradients through the policy's log-probs, so that its gradient is
        not its value's derivative.
        """
        return False

    @property
    def surrogate_statistics(self) -> tuple[str, ...]:
        """Names of the plan's statistics that stop gradients inside, so that their gradients are
        not their values' derivatives.
        """
        return ()

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """Closed-form optimal log-probs [..., n] for `reward` and reference log-probs, [..., n]
        each; None if there is none.
        """
        return None

    def backup(self, values: Tensor, reference: Tensor) -> Tensor | None:
        """Value [...] of a node of the token tree from its children's `values` and reference
        log-probs [..., V]; the policy there is `optimum(values, reference)`. None: the objective
        knows whole responses only.
        """
        return None

    def label_probability(self, reward: Tensor) -> Tensor:
        """Probability [..., n, n] that response i is labelled better
        than j, as `optimum` assumes it: Bradley-Terry.
        """
        return (reward.unsqueeze(-1) - reward.unsqueeze(-2)).sigmoid()

    @classmethod
    def examples(cls) -> Sequence["Objective"]:
        """Settings that together use every option: what `alignkit verify` checks."""
        return [cls()]

    @classmethod
    def limits(cls) -> Sequence[tuple["Objective", "Objective"]]:
        """Pairs of objectives that must have the same loss and gradient: a setting of this one, and
        what it turns into.
        """
        return ()

    def init_state(self) -> State:
        """Tensors the objective carries from step to step (an adaptive KL coefficient, ...);
        checkpointed by the loop.
        """
        return {}

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """Turn the global rollout's scores into advantages [N, T] (rollout objectives only)."""
        return rollout, state


def tilted(reward: Tensor, reference: Tensor, beta: float) -> Tensor:
    """log of reference * exp(reward / beta) / Z, the optimum of E[reward] - beta KL(policy ||
    reference): rewards and log-probs [..., n] -> [..., n].
    """
    return (reference + reward / beta).log_softmax(-1)


def best_of_n_logprobs(reference_logprobs: Tensor, rewards: Tensor, n: int) -> Tensor:
    """Log-probs of the best of `n` samples of the reference: [..., m] x 2 -> [..., m].

    With p_le and p_lt the reference's mass of rewards up to and below an outcome's, the law is
    reference * (p_le^n - p_lt^n) / (p_le - p_lt); outcomes of one reward share their mass in
    proportion to the reference. Sources: Beirami et al. 2024, arXiv:2401.01879, lemma 1; Sessa et
    al. 2024, arXiv:2407.14622, theorem 1.
    """
    reference = reference_logprobs.exp()
    rewards = rewards.expand_as(reference).contiguous()
    order = rewards.argsort(-1)
    ascending = rewards.gather(-1, order)
    up_to = torch.nn.functional.pad(reference.gather(-1, order).cumsum(-1).clamp(max=1), (1, 0))
    p_le = up_to.gather(-1, torch.searchsorted(ascending, rewards, right=True))
    p_lt = up_to.gather(-1, torch.searchsorted(ascending, rewards))

    # (p_le^n - p_lt^n) / (p_le - p_lt) as a sum of powers of their ratio, which loses no digits.
    log_ratio = (p_lt / p_le).log()
    powers = torch.expm1(n * log_ratio) / torch.expm1(log_ratio)
    factor = torch.where(log_ratio < 0, powers, float(n))
    law = reference_logprobs + (n - 1) * p_le.log() + factor.log()
    return law.where(reference > 0, -torch.inf).log_softmax(-1)


def forward_kl(
    policy_logprobs: Tensor, reference_logprobs: Tensor | None, labels: Tensor
) -> Tensor:
    """A plan's statistic: KL(reference || policy) over the vocabulary, [C, V] x 2, [C] -> [C].

    ShapeError where the plan has no anchor whose laws could be given.
    """
    if reference_logprobs is None:
        raise ShapeError("forward_kl: the reference's log-probs over the vocabulary were not given")
    return exact(policy_logprobs, reference_logprobs.detach(), "forward")


class SequenceObjective(Objective):
    """Learns from demonstrations."""

    @property
    def plan(self) -> Plan:
        return Plan("sequence", anchors=())


class PairObjective(Objective):
    """Learns from chosen/rejected pairs under a reference."""

    @property
    def plan(self) -> Plan:
        return Plan("pair")


class Weighted(Objective):
    """A weighted sum of objectives over one data family: the union of their terms and needs."""

    parts: Sequence[tuple[Objective, float]]

    @property
    def plan(self) -> Plan:
        plans = [part.plan for part, _ in self.parts]
        return combined(plans, self._family([plan.data for plan in plans]))

    @staticmethod
    def _family(families: Sequence[Family]) -> Family:
        """The one family whose batches serve every part. ConfigError where there is none."""
        for family in families:
            if set(families) <= {family, *FAMILIES[family].serves}:
                return family
        raise ConfigError(
            "objective: a weighted list needs one data family (sft may join pair objectives), "
            f"got {', '.join(sorted(set(families)))}"
        )

    def loss(self, batch: Batch) -> LossTerms:
        total = LossTerms([])
        for part, weight in self.parts:
            total = total + part.loss(batch).scaled(weight)
        return total

    def init_state(self) -> State:
        return {
            f"{number}.{name}": value
            for number, (part, _) in enumerate(self.parts)
            for name, value in part.init_state().items()
        }

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        raise ConfigError(
            "objective: rollout objectives cannot be summed in a weighted list: their advantages differ"
        )
