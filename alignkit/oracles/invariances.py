"""Checks of the conformance suite that hold for every objective: numerics, gradients, padding,
order, division, anchors.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import batch_type
from alignkit.objectives.base import Objective
from alignkit.oracles.worlds import TabularWorld, distance, gradient, reduced, solved, trained

EXTREMES = (50.0, 1e4)  # nats per completion
EXACT = 1e-10  # float64 arithmetic in another order
# signs of a bundle's completions in turn
PATTERNS = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])


@dataclass(frozen=True)
class Check:
    """One property of one objective: passed when `figure` is at most `bound`."""

    name: str
    figure: float
    bound: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure is within its bound."""
        return self.figure <= self.bound  # nan fails


def apart(world: TabularWorld, size: float, signs: Tensor) -> TabularWorld:
    """`world` in float32 with about `size` nats more between the policy and the others for each
    completion, of the sign that `signs` [2] gives to a bundle's completions in turn. Policy or the
    others lose probability; logits never grow.
    """
    starts = torch.cat([torch.arange(len(b.completions)) for b in world.bundles])
    push = (size * signs[starts % 2].unsqueeze(-1) / world.mask.sum(-1, keepdim=True)).unsqueeze(-1)
    at = torch.nn.functional.one_hot(world.labels, world.policy.shape[-1]) * push
    return replace(
        world,
        policy=(world.policy + at.clamp(max=0)).float(),
        anchors={
            name: (logits - at.clamp(min=0)).float() for name, logits in world.anchors.items()
        },
        behavior=(world.behavior - at.clamp(min=0)).float(),
    )


def finite(objective: Objective) -> Iterator[Check]:
    """Losses and gradients at ordinary and extreme log-ratios of
    either sign, in float32 and bfloat16.
    """
    world = TabularWorld.build(objective.plan)
    for dtype in (torch.float32, torch.bfloat16):
        broken = 0
        largest = 0.0

        for size in (0.0, *EXTREMES):
            for signs in PATTERNS:
                loss, grad = solved(objective, apart(world, size, signs).credited(objective), dtype)
                broken += int(not (loss.isfinite() and grad.isfinite().all()))
                largest = max(largest, float(grad.abs().max()))

        detail = f"log-ratios to 1e4; largest gradient {largest:.1e}"
        yield Check(f"finite, {str(dtype)[6:]}", broken, 0, detail)


def differentiated(objective: Objective) -> Iterator[Check]:
    """The gradient against central differences in float64, of the loss and of each statistic."""
    world = TabularWorld.build(objective.plan).credited(objective)
    tokens = world.tokens().map(Tensor.detach)
    if objective.surrogate:
        yield Check("gradcheck", 0, 0, "a surrogate: its value's derivative is not its gradient")
    else:
        error = _slope_error(
            lambda x: reduced(objective, world, replace(tokens, policy=x)), tokens.policy
        )
        yield Check("gradcheck", error, 1e-7)
    for name, statistic in objective.plan.statistics.items():
        if name in objective.surrogate_statistics:
            yield Check(f"gradcheck of {name}", 0, 0, "it stops gradients inside, as defined")
            continue
        read = objective.plan.read_by_statistics
        anchor = None if read is None else world.anchors[read].log_softmax(-1).flatten(0, 1)
        labels = world.labels.flatten()

        def total(
            x: Tensor, statistic: Any = statistic, anchor: Any = anchor, labels: Any = labels
        ) -> Tensor:
            return statistic(x.log_softmax(-1), anchor, labels).sum()

        error = _slope_error(total, world.policy.flatten(0, 1))
        yield Check(f"gradcheck of {name}", error, 1e-7)


def _slope_error(value: Callable[[Tensor], Tensor], point: Tensor, step: float = 1e-5) -> float:
    """Largest relative error of autograd along random directions."""
    noise = torch.Generator().manual_seed(0)
    errors = []
    leaf = point.detach().requires_grad_()
    out = value(leaf)
    grad = torch.autograd.grad(out, leaf, allow_unused=True)[0] if out.requires_grad else None

    for _ in range(5):
        direction = torch.randn(point.shape, generator=noise, dtype=point.dtype)
        rise = value(point + step * direction) - value(point - step * direction)
        slope = rise.detach() / (2 * step)
        from_autograd = slope.new_zeros(()) if grad is None else (grad * direction).sum()
        errors.append(float((from_autograd - slope).abs() / slope.abs().clamp(min=1)))
    return max(errors)


def invariant(objective: Objective) -> Iterator[Check]:
    """Padding, order and division into micro-batches change nothing."""
    world = TabularWorld.build(objective.plan).credited(objective)
    whole = solved(objective, world)
    loss, grad = solved(objective, world.padded(3))
    yield Check("padding", distance((loss, grad[:, : -3 or None]), whole), EXACT)

    order = list(range(len(world.bundles)))[::-1]
    sizes = [len(bundle.completions) for bundle in world.bundles]
    rows_of_bundles = torch.arange(len(world.better)).split(sizes)
    index = torch.cat([rows_of_bundles[i] for i in order])
    loss, grad = solved(objective, world.select(order))
    yield Check("permutation", distance((loss, grad), (whole[0], whole[1][index])), EXACT)

    parts = [[0], list(range(1, len(world.bundles)))]
    if objective.plan.coupled:
        split = _coupled_parts(objective, world, parts)
        detail = "through leaves, as the loop does"
    else:
        split = _parts(objective, world, parts)
        detail = ""
    yield Check("micro-batches", distance(split, whole), EXACT, detail)


def _parts(
    objective: Objective, world: TabularWorld, parts: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    counts = batch_type(objective.plan).counts(world.bundles)
    losses = []
    grads = []
    for chosen in parts:
        part = trained(world.select(chosen))
        loss = reduced(objective, part, part.tokens(), counts)
        losses.append(loss.detach())
        grads.append(gradient(loss, part))
    return torch.stack(losses).sum(), torch.cat(grads)


def _coupled_parts(
    objective: Objective, world: TabularWorld, parts: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """The loss of all parts on leaves, then its gradient with
    respect to them pulled back part by part.
    """
    tokens = world.tokens().map(Tensor.detach)
    extras = {name: value.requires_grad_() for name, value in tokens.extras.items()}
    tokens = replace(tokens, policy=tokens.policy.requires_grad_(), extras=extras)
    loss = reduced(objective, world, tokens)
    names = ["policy", *extras]
    leaves = [tokens.get(name) for name in names]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    pulls = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for name, leaf, grad in zip(names, leaves, gradients)
    }

    grads = []
    at = 0
    for chosen in parts:
        part = trained(world.select(chosen))
        mine = part.tokens()
        rows = slice(at, at := at + len(part.better))
        products = [(mine.get(name) * pull[rows]).sum() for name, pull in pulls.items()]
        grads.append(gradient(torch.stack(products).sum(), part))
    return loss.detach(), torch.cat(grads)


def anchored(objective: Objective) -> Iterator[Check]:
    """No gradient flows into an anchor or the behaviour policy, not even through a statistic."""
    world = TabularWorld.build(objective.plan).credited(objective)
    frozen = {name: logits.detach().requires_grad_() for name, logits in world.anchors.items()}
    world = replace(world, anchors=frozen, behavior=world.behavior.detach().requires_grad_())
    leaves = [*frozen.values(), world.behavior]
    loss = reduced(objective, world, world.tokens())
    grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else ()
    leaked = max((float(grad.abs().max()) for grad in grads if grad is not None), default=0.0)
    yield Check("no gradient into an anchor", leaked, 0)


CHECKS = (finite, differentiated, invariant, anchored)
