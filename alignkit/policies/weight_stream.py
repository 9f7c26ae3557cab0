"""The policy's weights as an engine that loads checkpoints wants them, tensor after tensor: whole,
under a checkpoint's names, with LoRA's update added. The model is never whole in memory, and stays
as it is, bit for bit.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from alignkit.errors import ModelError
from alignkit.policies.dtensors import full
from alignkit.policies.sharded_export import append, begun, converted_together

HASHED_AT_ONCE = 4  # tensors; a core hashes more slowly than a bus brings them


class WeightStream:
    """The tensors of a model's checkpoint as they are now, tied ones once.

    dtype  of the floating-point tensors that the stream gives

    Where the model is spread over processes, all of them have to iterate, or to `take_part`. Raises
    ModelError for adapters that are no LoRA, or on weights that are tied.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.dtype = dtype
        self.base, layers = _unwrapped(model)
        self._tensors: dict[str, Tensor] = {}
        self._layers: dict[str, Any] = {}  # the LoRA layer of a tensor, by the tensor's name
        first: dict[int, str] = {}  # the first name of each tensor

        for name, tensor in _live(self.base).items():
            if ".lora_" in name:
                continue  # added to the layer's own weight
            name = name.replace(".base_layer.", ".")
            layer = layers.get(name.removesuffix(".weight"))
            before = first.setdefault(id(tensor), name)
            if before == name:
                self._tensors[name] = tensor.detach()
                if layer is not None:
                    self._layers[name] = layer
            elif layer is not None or before in self._layers:
                raise ModelError(
                    f"model.adapter: {before} and {name} are tied, and a server keeps them as one; "
                    "the adapter makes them differ: leave them out of model.adapter.target_modules"
                )

        self._groups = converted_together(self.base, list(self._tensors))

    def shapes(self) -> dict[str, Tensor]:
        """What the stream gives, in its order, on the meta device."""
        given: dict[str, Tensor] = {}
        for group in self._groups:
            empty = {
                name: torch.empty(tensor.shape, dtype=self._kind(tensor), device="meta")
                for name, tensor in ((name, self._tensors[name]) for name in group)
            }
            given |= revert_weight_conversion(self.base, empty)
        return given

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, on the model's device."""
        for group in self._groups:
            content = {name: self._whole(name) for name in group}
            yield from revert_weight_conversion(self.base, content).items()

    @torch.no_grad()
    def take_part(self) -> None:
        """Lend this process's shards to those that iterate."""
        for name in chain.from_iterable(self._groups):  # in the order of those
            if isinstance(self._tensors[name], DTensor):
                self._whole(name)

    def _whole(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        layer = self._layers.get(name)
        if layer is not None:
            adapters = [
                a for a in layer.active_adapters if a in {*layer.lora_A, *layer.lora_embedding_A}
            ]
            tensor = tensor + sum(layer.get_delta_weight(adapter) for adapter in adapters)
        return full(tensor).to(self._kind(tensor))

    def _kind(self, tensor: Tensor) -> torch.dtype:
        return self.dtype if tensor.is_floating_point() else tensor.dtype


class Digest:
    """SHA-256 of each tensor of a stream while it goes by, and of all of them at its end. Tensors
    are hashed in threads of their own; at most a few are held.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(HASHED_AT_ONCE)
        self._lines: list[tuple[str, Future[str]]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Hash `tensor`, which nobody may change until `done`."""
        if len(self._lines) >= HASHED_AT_ONCE:
            self._lines[-HASHED_AT_ONCE][1].result()
        about = f"{name} {tensor.dtype} {list(tensor.shape)}"
        self._lines.append((about, self._pool.submit(_sha256, tensor)))

    def done(self) -> str:
        """The digest of names, kinds, shapes and contents, in order."""
        lines = [f"{about} {future.result()}\n" for about, future in self._lines]
        self._pool.shutdown()
        return sha256("".join(lines).encode()).hexdigest()


def write_weights(stream: WeightStream, folder: Path) -> str:
    """Write `folder`/model.safetensors, tensor by tensor, and return its digest.

    What the disk refuses is raised at the end, when all shards were gathered.
    """
    digest = Digest()
    failure: OSError | None = None
    try:
        file = begun(folder / "model.safetensors", stream.shapes())
    except OSError as error:
        stream.take_part()
        raise error

    with file:
        for name, tensor in stream:
            if failure is not None:
                continue
            on_cpu = tensor.cpu()
            digest.add(name, on_cpu)
            try:
                append(file, on_cpu)
            except OSError as error:
                failure = error
    if failure is not None:
        raise failure
    return digest.done()


def _sha256(tensor: Tensor) -> str:
    content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    return sha256(content.numpy().data).hexdigest()


def _live(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint as they are now, tied ones under each of their names."""
    state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                state[f"{path}.{name}".lstrip(".")] = buffer
    return state


def _unwrapped(model: Any) -> tuple[Any, dict[str, Any]]:
    """The causal language model itself, and its LoRA layers by name."""
    if not hasattr(model, "peft_config"):
        return model, {}
    from peft.tuners.lora import LoraLayer

    for name in model.active_adapters:
        config = model.peft_config[name]
        beyond_matrices = ("use_dora", "modules_to_save", "target_parameters")
        if (
            config.peft_type != "LORA"
            or config.bias != "none"
            or any(getattr(config, name, None) for name in beyond_matrices)
        ):
            raise ModelError(
                "model.adapter: DoRA, biases, whole modules, single parameters and kinds other than "
                "LORA cannot be folded into a server's weights"
            )
    base = model.get_base_model()
    return base, {
        name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)
    }
