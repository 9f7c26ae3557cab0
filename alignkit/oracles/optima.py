"""What a preference or RLHF objective should end at: its own closed form, and the minimiser of its
loss over all pairs.

Everything is enumerated in float64. A response space is a `Tree`; with depth 1 it is flat.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from alignkit.batches import PairBatch, SequenceBatch
from alignkit.errors import ConfigError, ShapeError
from alignkit.objectives.base import Objective
from alignkit.policies.tabular import Tree


def optimum(objective: Objective, reward: Tensor, reference: Tensor) -> Tensor | None:
    """The policy that `objective` ends at: `reward` and `reference` (probabilities), [..., n] each
    -> probabilities [..., n].

    In float64. None where the objective has no closed form. ShapeError for unequal shapes,
    ConfigError unless the reference is a distribution.
    """
    reward = reward.double()
    reference = reference.double()
    if reward.shape != reference.shape:
        raise ShapeError(
            f"optimum: reward {list(reward.shape)} and reference {list(reference.shape)} must have the same shape"
        )
    total = reference.sum(-1)
    if bool((reference < 0).any()) or not torch.allclose(total, torch.ones_like(total), atol=1e-6):
        raise ConfigError(
            "optimum: `reference` must be probabilities: not negative, with sum 1 over the last axis"
        )
    log_policy = objective.optimum(reward, reference.log())
    return None if log_policy is None else log_policy.exp()


def tree_optimum(
    objective: Objective, tree: Tree, reward: Tensor, reference: Tensor
) -> Tensor | None:
    """The same on a token tree: rewards of the responses [n], reference log-probs [S, V] -> policy
    log-probs [S, V] or None.

    An objective with a `backup` is solved from the leaves: at each prefix the optimum for the
    values of its continuations, whose backup is the value of the prefix. Others know whole
    responses, and their optimum is conditioned on prefixes.
    """
    policy = torch.zeros_like(reference)
    values = reward
    for t in reversed(range(tree.tokens.shape[1])):
        live = tree.mask[:, t]
        states = tree.prefixes[:, t]
        chosen = tree.tokens[:, t]
        table = torch.zeros_like(reference)
        table[states[live], chosen[live]] = values[live]

        backed = objective.backup(table, reference)
        next_token = objective.optimum(table, reference)
        if backed is None or next_token is None:
            flat = objective.optimum(reward, tree.sequence_logps(reference))
            return None if flat is None else tree.conditionals(flat)

        here = states[live].unique()
        policy[here] = next_token[here]
        values = torch.where(live, backed[states], values)
    return policy


def preference_loss(
    objective: Objective, tree: Tree, theta: Tensor, reference: Tensor, reward: Tensor
) -> Tensor:
    """The loss of policy `theta` [S, V] over all ordered pairs of responses, scalar: pair (i, j)
    weighs the probability that it is labelled that way under `reward` [n], times 1 / n^2 for
    drawing it.
    """
    tokens = tree.token_logps(
        theta, dict.fromkeys(objective.plan.anchors, reference), objective.plan
    )
    every = torch.cartesian_prod(*[torch.arange(len(reward))] * 2)
    out = objective.loss(PairBatch(tokens.select(every[:, 0]), tokens.select(every[:, 1])))
    weights = objective.label_probability(reward).flatten() / len(every)
    if any(term.unit != "rows" for term in out.terms):
        raise ConfigError("preference_loss: only terms per row have a population form here")
    return torch.stack([term.weight * (weights * term.values).sum() for term in out.terms]).sum()


def sequence_loss(objective: Objective, tree: Tree, theta: Tensor, reference: Tensor) -> Tensor:
    """The loss of policy `theta` [S, V] over all responses, each once, scalar; every anchor is
    `reference` [S, V].
    """
    tokens = tree.token_logps(
        theta, dict.fromkeys(objective.plan.anchors, reference), objective.plan
    )
    counts = {"rows": len(tree.tokens), "tokens": int(tree.mask.sum())}
    terms = objective.loss(SequenceBatch(tokens)).terms
    return torch.stack([t.weight * t.values.sum() / counts[t.unit] for t in terms]).sum()


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int = 2000) -> Tensor:
    """The minimiser of `loss` from `start` by L-BFGS in float64; same shape."""
    theta = start.detach().double().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=steps,
        history_size=50,
        tolerance_grad=1e-13,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(theta)
        value.backward()
        return value

    optimizer.step(closure)
    return theta.detach()
