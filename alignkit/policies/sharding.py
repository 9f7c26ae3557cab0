"""Weights spread over the processes by torch's `fully_shard` (FSDP2).

Each process holds a shard of every parameter, and no process ever holds them all: a unit of the
model (a block, the embedding, the rest) is put together for its own computation alone. Every
forward is therefore a collective operation, in which all processes take part;
`Shards.together` lets them call a model at different times and as often as each of them likes.
"""

import copy
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
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from alignkit.config.train import MeshConfig
from alignkit.errors import ConfigError
from alignkit.policies.dtensors import local
from alignkit.policies.module import PolicyModule, causal_lm, frozen

Network = PolicyModule | Any  # or a ScoreModule, which is made of the same parts


class Shards:
    """The processes that hold the shards, and the networks that are spread over them.

    mesh  the processes; with two dimensions, each row holds a whole model
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self._networks: list[Network] = []
        self._together = False
        self._inside = False  # inside the forward of a network

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

        for unit in (*_blocks(module), *_embedding(module)):
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=True)

        # The root is sharded again after its forward too, against torch's default: what a forward
        # without gradient left whole would be stale after the next update.
        fully_shard(module, mesh=self.mesh, reshard_after_forward=True)

        # The order in which backward gathers units is fixed here. Torch would record it from the
        # forwards, which may differ between processes when they sample in between. The last unit
        # of a backward has nothing to gather but itself.
        order = [module, *_blocks(module)[::-1], *_embedding(module)]
        for later, earlier in pairwise([*order, order[-1]]):
            later.set_modules_to_backward_prefetch([earlier])

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
            if depth == 1:
                self._meet(number)
                cast(FSDPModule, module).unshard()

        def after_inner(*_: object) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:
                _resharded(module)

        # The model inside may be called by itself, as samplers do, with peft's wrapper or without.
        module.register_forward_pre_hook(before, prepend=True)
        for inner in {module.model, causal_lm(module.model)}:
            inner.register_forward_pre_hook(before_inner, prepend=True)
            inner.register_forward_hook(after_inner, always_call=True)

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
    language_model = causal_lm(module.model)
    embedding = language_model.get_input_embeddings()
    others = [m for m in language_model.modules() if m is not embedding]
    elsewhere = {id(p) for m in others for p in m.parameters(recurse=False)}
    is_shared = any(id(p) in elsewhere for p in embedding.parameters(recurse=False))
    return [] if is_shared else [embedding]


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


def make_mesh(device_type: str, processes: int, wanted: MeshConfig | None = None) -> DeviceMesh:
    """All processes, each with a shard of its own, or as `train.mesh` wants them to stand.

    ConfigError where that is another number of processes.
    """
    if wanted is None:
        return init_device_mesh(device_type, (processes,), mesh_dim_names=("shard",))
    if wanted.replicate * wanted.shard != processes:
        raise ConfigError(
            f"train.mesh: {wanted.replicate} groups of {wanted.shard} are "
            f"{wanted.replicate * wanted.shard} processes, the run has {processes}; replicate times "
            "shard must be their number"
        )
    shape = (wanted.replicate, wanted.shard)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


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
