"""Checks of the conformance suite on what an objective claims: direction, fields, limits, its
gradient's KL, its optimum.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from omegaconf import OmegaConf
from pydantic import ValidationError
from torch import Tensor

from alignkit.batches import FAMILIES, Family, RolloutBatch
from alignkit.objectives.base import Objective
from alignkit.oracles.gradients import kl_misalignment
from alignkit.oracles.invariances import EXACT, EXTREMES, Check, apart
from alignkit.oracles.optima import minimise, preference_loss, sequence_loss, tree_optimum
from alignkit.oracles.worlds import TabularWorld, distance, reduced, solved
from alignkit.policies.tabular import Tree

SPACES = {"flat": Tree.build(5, 1, eos=False), "token tree": Tree.build(3, 2, eos=False)}
SLOPE = "slope of the loss towards better completions"


def direction(objective: Objective) -> Iterator[Check]:
    """Where policy, anchors and behaviour agree, a step of descent favours the better completions."""
    if objective.favours_better == "no preference":
        return
    if objective.favours_better == "not everywhere":
        yield Check("direction", 0, 0, "not claimed: the published loss is not monotone")
        return
    world = TabularWorld.build(objective.plan)
    same = dict.fromkeys(world.anchors, world.policy)
    world = replace(world, anchors=same, behavior=world.policy).credited(objective)
    slope = _slope(objective, world)
    yield Check("direction", slope, -1e-12, SLOPE)


def wrong_order(objective: Objective) -> Iterator[Check]:
    """Pairs that the policy orders wrongly by up to 2e4 nats are put right, however flat the loss
    may be there.
    """
    if objective.favours_better in ("not everywhere", "no preference"):
        return
    world = TabularWorld.build(objective.plan)
    signs = torch.tensor([-1.0, 1.0])
    for size in EXTREMES:
        slope = _slope(objective, apart(world, size, signs))
        least = 0.0 if objective.favours_better == "near" else -1e-12
        yield Check(f"direction, wrong by {2 * size:g} nats", slope, least, SLOPE)


def _slope(objective: Objective, world: TabularWorld) -> float:
    """Slope of the loss, by the policy's log-probs, towards the better completions: below 0, a step
    of descent favours them.
    """
    tokens = world.tokens().map(Tensor.detach)
    leaf = tokens.policy.requires_grad_()
    loss = reduced(objective, world, replace(tokens, policy=leaf))
    if not loss.requires_grad:
        return 0.0
    (grad,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    return 0.0 if grad is None else float((grad.sum(-1) * world.better).sum())


def fields(objective: Objective) -> Iterator[Check]:
    """Every number among the fields changes the loss, its gradient or the plan, in this setting or
    one of the examples.
    """
    settings = [objective, *type(objective).examples()]
    numbers = [
        name
        for name in type(objective).model_fields
        if any(_is_number(getattr(s, name)) for s in settings)
    ]
    idle = [name for name in numbers if not any(_matters(s, name) for s in settings)]
    yield Check("fields matter", len(idle), 0, f"no effect: {', '.join(idle)}" if idle else "")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _matters(objective: Objective, name: str) -> bool:
    """Whether a larger or a smaller value of the field `name` changes anything."""
    value = getattr(objective, name)
    if not _is_number(value):
        return False

    if isinstance(value, int):
        changes: tuple[float, float] = (value + 1, max(value - 1, 1))
    else:
        changes = (1.3 * value + 0.05, 0.7 * value)

    for changed in changes:
        try:
            other = type(objective)(**{**objective.model_dump(), name: changed})
        except ValidationError:
            continue

        # Statistics are functions and cannot be compared; what they compute enters the loss below.
        if replace(objective.plan, statistics={}) != replace(other.plan, statistics={}):
            return True
        mine, theirs = (
            solved(o, TabularWorld.build(o.plan).credited(o)) for o in (objective, other)
        )
        if distance(theirs, mine) > 1e-9 or _carried(objective) != _carried(other):
            return True
    return False


def _carried(objective: Objective) -> dict[str, list[float]]:
    """What a rollout objective remembers after one rollout (an adaptive coefficient)."""
    if not FAMILIES[objective.plan.data].credited:
        return {}
    world = TabularWorld.build(objective.plan)
    rollout = RolloutBatch.build(world.bundles, world.tokens().map(Tensor.detach))
    return {
        name: value.flatten().tolist()
        for name, value in objective.credit(rollout, objective.init_state())[1].items()
    }


def readable(objective: Objective) -> Iterator[Check]:
    """Written as YAML and read again it is the same objective."""
    text = OmegaConf.to_yaml(OmegaConf.create(objective.model_dump(mode="json")))
    again = type(objective)(**OmegaConf.to_container(OmegaConf.create(text)))  # type: ignore[arg-type]
    yield Check("YAML round trip", float(again != objective), 0)


def limits(objective: Objective) -> Iterator[Check]:
    """The declared pairs of objectives agree in loss and gradient."""
    for own, other in type(objective).limits():
        pair = [solved(o, TabularWorld.build(o.plan, seed=1).credited(o)) for o in (own, other)]
        yield Check(
            f"limit {type(other).__name__}", distance(*pair), EXACT, f"{own!r} is {other!r}"
        )


def optimum(objective: Objective) -> Iterator[Check]:
    """Minimising the loss over all pairs, or over all responses, ends at the declared optimum, flat
    and on a token tree.
    """
    for name, tree in SPACES.items():
        error = optimum_error(objective, tree)
        if error is not None:
            yield Check(f"optimum, {name}", error, 1e-6, "largest error of a response's log-prob")


def optimum_error(objective: Objective, tree: Tree, seed: int = 0) -> float | None:
    """Largest difference in log-prob between the minimiser of the loss of an objective on pairs or
    demonstrations and its closed form, for random rewards and a random reference; None without a
    closed form.
    """
    noise = torch.Generator().manual_seed(seed)
    reference = torch.randn(
        tree.states, tree.vocab, generator=noise, dtype=torch.float64
    ).log_softmax(-1)
    reward = torch.randn(len(tree.tokens), generator=noise, dtype=torch.float64)
    wanted = tree_optimum(objective, tree, reward, reference)
    if wanted is None:
        return None

    def loss(theta: Tensor) -> Tensor:
        if objective.plan.data == "sequence":
            return sequence_loss(objective, tree, theta, reference)
        return preference_loss(objective, tree, theta, reference, reward)

    # Imitation ends at the reference itself, so it has to begin elsewhere.
    start = torch.zeros_like(reference) if objective.plan.data == "sequence" else reference
    minimiser = minimise(loss, start)
    return float((tree.sequence_logps(minimiser) - tree.sequence_logps(wanted)).abs().max())


def kl_gradient(objective: Objective) -> Iterator[Check]:
    """The KL that a rollout objective's penalty claims to follow is the one that its gradient
    follows, by enumeration.
    """
    claim = getattr(objective, "kl_gradient", None)
    if claim is not None:
        name = " ".join(claim)
        yield Check(
            f"gradient of the {name} KL",
            kl_misalignment(objective)[name],
            1e-8,
            "misalignment, expectation by enumeration",
        )


COMMON = (direction, fields, readable, limits)
BY_FAMILY: dict[Family, tuple[Callable[[Objective], Iterator[Check]], ...]] = {
    "sequence": (optimum,),
    "pair": (optimum, wrong_order),
    "rollout": (kl_gradient,),
}
