"""Weights spread over the processes by torch's `fully_shard` (FSDP2).

Each process holds a shard of every parameter, and no process ever holds them all: a unit of the
model (a block, the embedding, the rest) is put together for its own computation alone. Every
forward is therefore a collective operation, in which all processes take part;
`Shards.together` lets them call a model at different times and as often as each of them likes.
"""

import copy
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from alignkit.config.train import MeshConfig, TrainConfig
from alignkit.errors import ConfigError, ModelError
from alignkit.policies.dtensors import local
from alignkit.policies.gathering import GatheredInPlace
from alignkit.policies.module import PolicyModule, Tail, causal_lm, frozen
from alignkit.policies.tensor_parallel import Group, divide

TENSOR = "tensor"  # the dimension of the mesh whose processes compute together
Network = PolicyModule | Any  # or a ScoreModule, which is made of the same parts


class Shards:
    """The processes that hold the shards, and the networks that are spread over them.

    mesh    all processes, as `make_mesh` has them stand
    group   those that compute a forward together with this one; None: each computes its own

    Gradients are summed over processes in `reduce_dtype`, or in the weights' own where it is None.
    """

    def __init__(self, mesh: DeviceMesh, reduce_dtype: torch.dtype | None = None) -> None:
        names = mesh.mesh_dim_names or ()
        self.mesh = mesh
        self.group: Group | None = None
        if TENSOR in names:
            self.mesh = mesh[tuple(name for name in names if name != TENSOR)]
            self.group = Group(mesh[TENSOR], self._is_apart)
            # It says at length that two collectives take longer than one.
            logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        self._precision = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
        self._networks: list[Network] = []
        self._together = False
        self._inside = False  # inside the forward of a network
        self._sampling = 0  # inside so many calls of models without their wrapper

    def _is_apart(self) -> bool:
        """Whether processes call networks for themselves, with rows that the others do not know."""
        return self._together or self._sampling > 0

    def place(self, module: Network, fill: Callable[[], None]) -> None:
        """Shard a module, let `fill` give the shards their content, and make it ready."""
        self.spread(module)
        fill()
        self.start(module)

    def spread(self, module: Network) -> None:
        """Shard the parameters, and with them gradients and the optimiser's moments: the model's
        blocks one by one, the embedding, then the rest. They may be on the meta device still.

        From here on only forwards of the module, or of the model inside it, may use the parameters.
        """
        # A copy that holds nothing but the shapes is what anchors are made from later.
        if any(p.is_meta for p in module.parameters()):
            module.__dict__["blueprint"] = copy.deepcopy(module)

        if self.group is not None:
            if hasattr(module.model, "peft_config"):
                raise ModelError(
                    "train.mesh.tensor: a model with an adapter cannot be cut by its tp_plan; merge "
                    "the adapter first, or leave `tensor` out"
                )
            if not isinstance(module, PolicyModule):
                raise ConfigError(
                    "train.mesh.tensor: reward and preference models cannot be cut; leave it out, "
                    "and let `shard` spread the model over more processes"
                )
            divide(module, causal_lm(module.model), self.group)

        tail = _tail(module)
        for unit in (*_blocks(module), *_embedding(module), *tail):
            self._shard(unit)

        # The root is sharded again after its forward too, against torch's default: what a forward
        # without gradient left whole would be stale after the next update.
        self._shard(module, {p for part in tail for p in part.parameters()})

        # The order in which backward gathers units is fixed here. Torch would record it from the
        # forwards, which may differ between processes when they sample in between. The last unit
        # of a backward has nothing to gather but itself.
        order = [module, *tail, *_blocks(module)[::-1], *_embedding(module)]
        for later, earlier in pairwise([*order, order[-1]]):
            later.set_modules_to_backward_prefetch([earlier])

    def _shard(self, unit: nn.Module, others: set[nn.Parameter] | None = None) -> None:
        """Shard what is not sharded yet; `others` belong to the tail, which stands elsewhere too."""
        fully_shard(
            unit,
            mesh=self.mesh,
            reshard_after_forward=True,
            mp_policy=self._precision,
            ignored_params=others,
        )
        if self.mesh.device_type == "cpu":
            cast(FSDPModule, unit).set_custom_all_gather(cast(Any, GatheredInPlace()))

    def start(self, module: Network) -> None:
        """Make a network that is spread, and whose weights are there, ready to be called. All
        processes call this in the same order.
        """
        self._networks.append(module)
        number = len(self._networks)
        depth = 0  # a model may be called through its wrapper

        def before(*_: object) -> None:
            self._meet(number)

        def before_inner(*_: object) -> None:
            nonlocal depth
            depth += 1
            self._sampling += 1
            if depth == 1:
                self._meet(number)
                cast(FSDPModule, module).unshard()

        def after_inner(*_: object) -> None:
            nonlocal depth
            depth -= 1
            self._sampling -= 1
            if depth == 0:
                _resharded(module)

        def before_head(*_: object) -> None:
            if depth:
                cast(FSDPModule, module.tail).unshard()

        # The model inside may be called by itself, as samplers do, with peft's wrapper or without.
        module.register_forward_pre_hook(before, prepend=True)
        for inner in {module.model, causal_lm(module.model)}:
            inner.register_forward_pre_hook(before_inner, prepend=True)
            inner.register_forward_hook(after_inner, always_call=True)

        if getattr(module, "tail", None) is not None:
            _head(module).register_forward_pre_hook(before_head, prepend=True)

        # FSDP2 takes the first module that is called for its root.
        with torch.no_grad():
            module.touch()

    def forget(self, module: Network) -> None:
        """Let go of a network that nothing will call any more; all processes call this."""
        self._networks[self._networks.index(module)] = None

    def any(self, own: bool) -> bool:
        """Whether something holds on any process; all processes call this."""
        return self._largest(int(own)) > 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside the block each process may call the networks as often as it likes, without
        gradients. Every process has to enter; one that leaves first waits for the others, and takes
        part in their forwards until all are done.
        """
        if self._together:
            yield
            return

        self._together = True
        try:
            yield
        finally:
            self._meet(0)
            self._together = False

    def _meet(self, number: int) -> None:
        """Before a forward of network `number` (0: no more forwards): take part in those of other
        networks that are asked for first.
        """
        if not self._together or self._inside:
            return
        while (turn := self._largest(number)) != number:
            self._inside = True
            try:
                with torch.no_grad():
                    self._networks[turn - 1].touch()
            finally:
                self._inside = False

    def _largest(self, number: int) -> int:
        """The largest number of all processes."""
        largest = torch.tensor(number, device=self.mesh.device_type)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)


def _blocks(module: Network) -> list[Any]:
    language_model = causal_lm(module.model)
    names = set(getattr(language_model, "_no_split_modules", None) or ())
    return [m for m in language_model.modules() if type(m).__name__ in names]


def _embedding(module: Network) -> list[Any]:
    """The input embedding, unless its weight serves as the head's too."""
    embedding = causal_lm(module.model).get_input_embeddings()
    return [] if _is_shared(module, embedding) else [embedding]


def _head(module: Network) -> Any:
    return causal_lm(module.model).get_output_embeddings()


def _tail(module: Network) -> list[Any]:
    """The head, and the module's own heads, as one unit; none where the head's weight is that of
    the embedding.
    """
    if not isinstance(module, PolicyModule) or _is_shared(module, _head(module)):
        return []
    others = [part for part in (module.value_head, module.bin_head) if part is not None]
    module.tail = Tail(module.finish, [_head(module), *others])
    return [module.tail]


def _is_shared(module: Network, part: nn.Module) -> bool:
    """Whether a weight of `part` is used elsewhere in the language model too."""
    inside = set(part.modules())
    others = [m for m in causal_lm(module.model).modules() if m not in inside]
    elsewhere = {id(p) for m in others for p in m.parameters(recurse=False)}
    return any(id(p) in elsewhere for p in part.parameters())


def _resharded(module: nn.Module) -> None:
    """Every unit is a shard again, also after a forward that failed half-way."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@dataclass(frozen=True, eq=False)
class Owned:
    """A parameter with every place where a module holds it: tied weights have several."""

    places: list[tuple[nn.Module, str]]

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now."""
        module, name = self.places[0]
        parameter = module._parameters[name]
        assert parameter is not None
        return parameter

    @torch.no_grad()
    def on_device(self, device: torch.device | str) -> Tensor:
        """This process's part of the parameter, which is given memory there (of no content yet)
        where it is on the meta device.
        """
        old = self.parameter
        if not old.is_meta:
            return local(old)

        part = torch.empty_like(local(old), device=device)
        new: Tensor = part
        if isinstance(old, DTensor):
            new = DTensor.from_local(
                part,
                old.device_mesh,
                old.placements,
                run_check=False,
                shape=old.shape,
                stride=old.stride(),
            )
        parameter = nn.Parameter(new, requires_grad=old.requires_grad)
        for module, name in self.places:
            module._parameters[name] = parameter
        return part


def owned(model: nn.Module) -> list[Owned]:
    """Every parameter of a model once."""
    return list(dict.fromkeys(named_owned(model).values()))


def named_owned(model: nn.Module) -> dict[str, Owned]:
    """Every parameter of a model under each of its names."""
    by_parameter: dict[int, Owned] = {}
    by_name: dict[str, Owned] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            one = by_parameter.setdefault(id(parameter), Owned([]))
            if (module, name) not in one.places:
                one.places.append((module, name))
            by_name[f"{path}.{name}".lstrip(".")] = one
    return by_name


@torch.no_grad()
def frozen_copy(module: PolicyModule, shards: Shards | None) -> PolicyModule:
    """A copy of the policy with weights of its own, without gradients or value head, in evaluation
    mode; sharded as the policy is.
    """
    blueprint = module.__dict__.get("blueprint")
    twin: PolicyModule = copy.deepcopy(blueprint or module)
    frozen(twin)
    if blueprint is None or shards is None:
        return twin

    twin.temperature = module.temperature
    twin.router = module.router
    shards.spread(twin)
    device = next(module.parameters()).device
    for own, value in zip(owned(twin.model), owned(module.model), strict=True):
        own.on_device(device).copy_(local(value.parameter))
    for buffer, value in zip(twin.model.buffers(), module.model.buffers(), strict=True):
        buffer.copy_(value)
    shards.start(twin)
    return twin


def make_shards(device_type: str, processes: int, train: TrainConfig) -> Shards:
    """The shards that a recipe's `train` section describes. ConfigError."""
    reduce_dtype = torch.float32 if train.reduce_dtype == "float32" else None
    return Shards(make_mesh(device_type, processes, train.mesh), reduce_dtype)


def make_mesh(device_type: str, processes: int, wanted: MeshConfig | None = None) -> DeviceMesh:
    """All processes, each with a shard of its own, or as `train.mesh` wants them to stand.

    ConfigError where that is another number of processes.
    """
    if wanted is None:
        return init_device_mesh(device_type, (processes,), mesh_dim_names=("shard",))
    shape = wanted.shape(processes)
    names = {name: size for name, size in shape.items() if size > 1 or name == "shard"}
    return init_device_mesh(device_type, tuple(names.values()), mesh_dim_names=tuple(names))


def is_sharded(module: nn.Module) -> bool:
    """Whether every trainable parameter is a shard."""
    return all(isinstance(p, DTensor) for p in module.parameters() if p.requires_grad)


def check_launch(accelerator: Any) -> None:
    """ConfigError for launchers whose optimiser states alignkit cannot checkpoint."""
    if str(accelerator.distributed_type).endswith(("DEEPSPEED", "MEGATRON_LM")):
        raise ConfigError(
            "accelerate was launched for DeepSpeed or Megatron, which alignkit cannot checkpoint; "
            "use train.shard"
        )


def check_sharded(module: nn.Module) -> None:
    """ConfigError where accelerate was launched for FSDP but silently left the policy unsharded."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not is_sharded(module):
        raise ConfigError(
            "accelerate was launched for FSDP but did not shard the policy (it does not on CPUs, "
            "nor with FSDP version 1); set train.shard=true and launch without FSDP, or set "
            "fsdp_version: 2"
        )
