"""Expected gradients by enumeration: what an estimator or an objective optimises, against autograd
of the exact quantity.

A policy is a table of logits theta [S, V], one row per prefix of a `Tree`; expectations are finite
sums, so two gradients that should agree agree to float64 rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from alignkit.batches import RolloutBatch, TokenLogps
from alignkit.kl import Direction, exact
from alignkit.objectives.base import Objective
from alignkit.policies.tabular import Tree
from alignkit.tensors import masked_sum


def gradient(value: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """Autograd of the scalar `value` at `theta`, same shape; zeros where it does not depend on it."""
    leaf = theta.detach().clone().requires_grad_()
    out = value(leaf)
    if not out.requires_grad:
        return torch.zeros_like(theta)
    (grad,) = torch.autograd.grad(out, leaf, allow_unused=True)
    return torch.zeros_like(theta) if grad is None else grad


def expected_gradient(losses: Callable[[Tensor], Tensor], theta: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the mean loss under fixed response probabilities: losses(theta) [n], [S, V], [n]
    -> [S, V].

    This is what a trainer computes in the mean: the sampling distribution is not differentiated.
    """
    return gradient(lambda leaf: (weights.detach() * losses(leaf)).sum(), theta)


def sequence_kl(
    tree: Tree, theta: Tensor, reference: Tensor, direction: Direction = "reverse"
) -> Tensor:
    """Exact KL between response distributions, scalar: "reverse" is KL(theta || reference)."""
    return exact(tree.sequence_logps(theta), tree.sequence_logps(reference), direction)


def token_kl(
    tree: Tree, theta: Tensor, reference: Tensor, direction: Direction = "reverse"
) -> Tensor:
    """Per-prefix KLs weighted by theta's stopped visiting probabilities, scalar: its gradient is
    the partial one.
    """
    visits = tree.sequence_logps(theta).exp().detach()
    per_token = exact(tree.logprobs(theta), tree.logprobs(reference), direction)
    return (visits * masked_sum(per_token, tree.mask)).sum()


def regularised_value(
    tree: Tree, theta: Tensor, reward: Tensor, reference: Tensor, beta: float
) -> Tensor:
    """J = E_theta[reward] - beta KL(theta || reference), scalar; `reward` [n]."""
    return (tree.sequence_logps(theta).exp() * reward).sum() - beta * sequence_kl(
        tree, theta, reference
    )


@dataclass(frozen=True)
class Population:
    """A rollout of groups of two in which every pair of responses
    occurs exactly as often as its probability says.

    A mean over this batch IS an expectation over independent pairs, so leave-one-out baselines and
    whitening over the batch take their exact population values and the gradient of the reduced loss
    is the expected gradient.
    """

    tree: Tree
    theta: Tensor  # [S, V] the policy, which also sampled
    reference: Tensor  # [S, V]
    rows: Tensor  # [N] response of each row; rows 2i and 2i + 1 share a group

    @classmethod
    def build(cls, tree: Tree | None = None, seed: int = 0) -> "Population":
        """Probabilities proportional to small whole numbers and a random reference; by default nine
        responses of two tokens.
        """
        tree = tree or Tree.build(3, 2, eos=False)
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(1, 5, (len(tree.tokens),), generator=generator)
        theta = torch.zeros(tree.states, tree.vocab, dtype=torch.float64)
        decisions = (tree.prefixes[tree.mask], tree.tokens[tree.mask])
        theta.index_put_(
            decisions, counts[:, None].expand_as(tree.mask)[tree.mask].double(), accumulate=True
        )
        reference = torch.randn(theta.shape, dtype=torch.float64, generator=generator)
        urn = torch.arange(len(counts)).repeat_interleave(counts)
        return cls(tree, theta.log(), reference, torch.cartesian_prod(urn, urn).flatten())

    def batch(self, objective: Objective, theta: Tensor, scores: Tensor) -> RolloutBatch:
        """The rollout under `theta` [S, V] with `scores` [n] and everything that the objective's
        plan asks for.
        """
        tree = self.tree
        plan = objective.plan
        policy = tree.logprobs(theta)
        reference = tree.logprobs(self.reference)

        extras = {
            name: statistic(
                policy.flatten(0, 1), reference.flatten(0, 1), tree.tokens.flatten()
            ).reshape(tree.mask.shape)
            for name, statistic in plan.statistics.items()
        }
        extras["entropy"] = -(policy.exp() * policy).sum(-1).detach()
        # Any function of the prefix will do as a value head: a baseline does not move the mean.
        if plan.values:
            extras["values"] = torch.linspace(-1, 1, tree.states, dtype=theta.dtype)[tree.prefixes]

        anchors = {name: tree.logps(self.reference) for name in plan.anchors}
        tokens = TokenLogps(tree.logps(theta), anchors, tree.mask, tree.logps(self.theta), extras)
        groups = torch.arange(len(self.rows)) // 2
        return RolloutBatch(
            tokens.select(self.rows), scores[self.rows], groups, ids=tree.tokens[self.rows]
        )

    def delivered(self, objective: Objective, scores: Tensor, at: Tensor | None = None) -> Tensor:
        """Expected gradient of the objective's whole way, credit, loss
        and reduction: scores [n] -> [S, V].

        `at` [S, V]: the policy after some updates on the same rollout; left out, the one that
        sampled.
        """
        with torch.no_grad():
            credited, _ = objective.credit(
                self.batch(objective, self.theta, scores), objective.init_state()
            )

        def reduced(theta: Tensor) -> Tensor:
            batch = self.batch(objective, theta, scores)
            filled = replace(credited, tokens=batch.tokens)
            counts = {"rows": len(self.rows), "tokens": int(batch.tokens.mask.sum())}
            return sum(
                (t.weight * t.values.sum() / counts[t.unit] for t in objective.loss(filled).terms),
                theta.new_zeros(()),
            )

        return gradient(reduced, self.theta if at is None else at)


def misalignment(delivered: Tensor, wanted: Tensor) -> float:
    """0 where `delivered` is a positive multiple of `wanted`, else the part of it that is not,
    relative to its size (up to 1).
    """
    scale = (delivered * wanted).sum() / (wanted**2).sum()
    size = delivered.norm()
    if size == 0 or scale <= 0:
        return 1.0
    return float((delivered - scale * wanted).norm() / size)


def kl_misalignment(objective: Objective) -> dict[str, float]:
    """How far the KL part of a rollout objective's gradient is from each KL's: "sequence reverse"
    etc. -> misalignment.

    The KL part is what is left when all scores are 0.
    """
    population = Population.build()
    no_scores = torch.zeros(len(population.tree.tokens), dtype=torch.float64)
    delivered = population.delivered(objective, no_scores)

    result = {}
    for credit, value in (("sequence", sequence_kl), ("token", token_kl)):
        for direction in ("reverse", "forward"):
            exact_value = partial(
                value, population.tree, reference=population.reference, direction=direction
            )
            wanted = gradient(exact_value, population.theta)
            result[f"{credit} {direction}"] = misalignment(delivered, wanted)
    return result


def check_kl_gradient(objective: Objective, tolerance: float = 1e-8) -> None:
    """AssertionError where a rollout objective's `kl_gradient` claims one KL and its loss delivers
    another (or none).
    """
    claim = getattr(objective, "kl_gradient", None)
    if claim is None:
        return
    distances = kl_misalignment(objective)
    name = " ".join(claim)
    nearest = min(distances, key=distances.__getitem__)
    assert distances[name] < tolerance, (
        f"{type(objective).__name__} documents the gradient of the {name} KL but delivers "
        f"something {distances[name]:.1e} away; nearest is the {nearest} KL "
        f"({distances[nearest]:.1e}). alignkit.kl says which estimator has which gradient"
    )
