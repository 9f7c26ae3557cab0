"""Tensor parallelism: the processes of a group hold parts of each weight matrix and compute one
forward together, as the model's own `tp_plan` says (transformers).

All weights become DTensors over the group: those of the plan are cut, the others are whole on each
process. A forward of the group computes the rows of all its processes (`Group.joined`), so that
each process can go on having rows of its own. Where processes call a model at different times, as
samplers do, each matrix is put together for its own product instead (`Group.is_apart`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from transformers.integrations.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    replace_layer_number_by_wildcard,
)

from alignkit.batches import Bundle, TokenLogps
from alignkit.errors import ModelError

# Styles of a plan by what of the weight they cut. The rows of a linear layer are its outputs, which
# is why they are called columns there.
BY_ROWS = ("colwise", "colwise_gather_output", "colwise_rep", "embedding_rowwise")
BY_COLUMNS = ("rowwise", "rowwise_rep", "rowwise_split_input", "embedding_colwise")
SUMMED = "replicated_with_grad_allreduce"  # whole weights that see a part of the heads


Own = Callable[[TokenLogps], TokenLogps]


@dataclass
class Group:
    """The processes that compute a forward together.

    mesh      its one dimension is this group
    is_apart  whether each process now calls models for itself
    """

    mesh: DeviceMesh
    is_apart: Callable[[], bool]

    def joined(self, bundles: Sequence[Bundle]) -> tuple[Sequence[Bundle], Own]:
        """The bundles of all processes of the group, and what takes this one's part of what is then
        computed. All of them call this, unless they are apart.
        """
        if self.is_apart():
            return bundles, lambda tokens: tokens
        everyone: list[list[Bundle]] = [[] for _ in range(self.mesh.size())]
        dist.all_gather_object(everyone, list(bundles), group=self.mesh.get_group())
        sizes = [sum(len(b.completions) for b in part) for part in everyone]
        place = self.mesh.get_local_rank()
        start = sum(sizes[:place])
        mine = slice(start, start + sizes[place])
        return [b for part in everyone for b in part], partial(self._own, bundles, mine)

    def _own(self, bundles: Sequence[Bundle], part: slice, tokens: TokenLogps) -> TokenLogps:
        """This process's part of what was computed for the group. Its gradient is the mean over the
        group of the gradients that the processes have for their own parts.
        """
        values = {"policy": tokens.policy, **tokens.extras}
        trained = {name: value for name, value in values.items() if value.requires_grad}
        if trained:
            averaged = _MeanGradient.apply(self.mesh.get_group(), *trained.values())  # type: ignore[no-untyped-call]
            values |= zip(trained, averaged)

        longest = max(len(ids) for bundle in bundles for ids in bundle.completions)
        cut = replace(tokens, policy=values.pop("policy"), extras=values).map(
            lambda value: value[part, :longest]
        )
        whole = tokens.whole_lengths
        return replace(cut, whole_lengths=None if whole is None else whole[part])


class _MeanGradient(torch.autograd.Function):
    """The values as they are; backward averages their gradients over a group, all of them at once,
    so that every process of the group takes part whichever of them its loss uses.
    """

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        means = []
        for gradient in gradients:
            mean = gradient.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(mean, group=ctx.group)
            means.append(mean / dist.get_world_size(ctx.group))
        return None, *means


def check_plan(model: Any, size: int) -> dict[str, str]:
    """The plan of a causal LM that `size` processes can follow: the path of a module, with `*` for
    the number of a layer -> style. ModelError where there is none.
    """
    plan = dict(getattr(model, "tp_plan", None) or {})
    name = type(model).__name__
    if not plan:
        raise ModelError(
            f"train.mesh.tensor: transformers has no tp_plan for {name}; leave `tensor` out, and "
            "let `shard` spread the model over more processes"
        )

    known = (*BY_ROWS, *BY_COLUMNS, SUMMED)
    strange = sorted({style for style in plan.values() if style not in known})
    if strange:
        raise ModelError(
            f"train.mesh.tensor: the tp_plan of {name} asks for {strange[0]}, and alignkit follows "
            f"{', '.join(known)} alone; leave `tensor` out, and let `shard` spread the model over "
            "more processes"
        )

    config = model.config.get_text_config()
    heads = {
        field: getattr(config, field, None)
        for field in ("num_attention_heads", "num_key_value_heads")
    }
    uneven = {field: n for field, n in heads.items() if n is not None and n % size}
    for field, number in uneven.items():
        raise ModelError(
            f"train.mesh.tensor: {size} does not divide the {number} of {field} of {name}; choose "
            f"a number that does, or leave `tensor` out"
        )
    return plan


def divide(module: nn.Module, model: Any, group: Group) -> None:
    """Cut the weights of `module` as the plan of the causal LM `model` inside it says. They may be
    on the meta device still. Raises ModelError.
    """
    size = group.mesh.size()
    plan = check_plan(model, size)
    uses: dict[int, int] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1

    paths = {id(part): path for path, part in model.named_modules()}
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for part in module.modules():
        if not part._parameters:
            continue
        style = plan.get(replace_layer_number_by_wildcard(paths.get(id(part), "")))
        is_shared = any(uses[id(p)] > 1 for p in part.parameters(recurse=False))
        if style in (*BY_ROWS, *BY_COLUMNS) and not is_shared and _is_even(part, style, size):
            _cut(part, style, group)
        else:
            _keep_whole(part, group, made, Partial() if style == SUMMED else Replicate())


def _is_even(part: nn.Module, style: str, size: int) -> bool:
    """Whether the matrix can be cut. ModelError where it cannot, and its neighbours would be; an
    embedding, and a head that gives its output whole, can also stay whole.
    """
    rows, columns = part.weight.shape  # type: ignore[misc]
    length = int(rows if style in BY_ROWS else columns)
    if length % size == 0:
        return True
    if style not in ("colwise", *BY_COLUMNS[:3]):
        return False
    raise ModelError(
        f"train.mesh.tensor: {size} does not divide a weight of {rows} x {columns} that the tp_plan "
        "cuts; choose a number that does, or leave `tensor` out"
    )


def _cut(part: nn.Module, style: str, group: Group) -> None:
    """Cut a linear layer or an embedding; its forward is transformers' own, or that of the whole layer for a
    process that is apart.
    """
    cutting: Any = ALL_PARALLEL_STYLES[style]
    for name in [*part._parameters]:
        cutting.shard_param(part, name, group.mesh)
    whole = part.forward
    cutting.install_forward(part, group.mesh)
    together = part.forward

    def forward(*args: Any, **options: Any) -> Any:
        if not group.is_apart():
            return together(*args, **options)
        with _parameters(part, lambda p: p.full_tensor()):
            return whole(*args, **options)

    part.forward = forward


def _keep_whole(
    part: nn.Module, group: Group, made: dict[int, nn.Parameter], gradient: Placement
) -> None:
    """A module whose weights every process has whole. `gradient` says whether a process's gradient
    is all of it, or its part of a sum.
    """
    for name, old in part._parameters.items():
        if old is None:
            continue
        if id(old) not in made:
            spread = DTensor.from_local(old.detach(), group.mesh, [Replicate()], run_check=False)
            made[id(old)] = nn.Parameter(spread, requires_grad=old.requires_grad)
        part._parameters[name] = made[id(old)]

    plain = part.forward

    def forward(*args: Any, **options: Any) -> Any:
        with _parameters(part, partial(_local, gradient)):
            return plain(*args, **options)

    part.forward = forward


def _local(gradient: Placement, parameter: DTensor) -> Tensor:
    return parameter.to_local(grad_placements=[gradient])


@contextmanager
def _parameters(part: nn.Module, of: Callable[[DTensor], Tensor]) -> Iterator[None]:
    """Inside the block the module's own parameters are plain tensors."""
    before: Mapping[str, Any] = dict(part._parameters)
    for name, parameter in before.items():
        if isinstance(parameter, DTensor):
            part._parameters[name] = of(parameter)  # type: ignore[assignment]
    try:
        yield
    finally:
        part._parameters.update(before)


def whole_copy(part: nn.Module) -> nn.Module:
    """A copy of a linear layer with whole weights of its own, which no process shares."""
    twin = nn.Module.__new__(type(part))
    twin.__dict__.update(part.__dict__)
    twin.__dict__.pop("forward", None)  # of the part in a group
    twin._parameters = {
        name: None if p is None else nn.Parameter(_whole(p), requires_grad=False)
        for name, p in part._parameters.items()
    }
    return twin


def _whole(parameter: Tensor) -> Tensor:
    # The whole of what is not cut is no copy: its memory is given up after the forward.
    detached = parameter.detach()
    return (detached.full_tensor() if isinstance(detached, DTensor) else detached).clone()
