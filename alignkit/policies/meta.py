"""Models that are never whole in memory: built without weights, spread over the processes, and then
filled by each process with its own slices of the files.

Names, tied weights and conversions (experts that are stacked, projections that are split) are those
of transformers' own loading.
"""

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.initialization import no_init_weights

from alignkit.errors import ModelError
from alignkit.policies.sharding import Owned, named_owned, owned
from alignkit.policies.slices import Region, Stored, StoredTensors
from alignkit.policies.weights import model_folder, weight_files

log = logging.getLogger("alignkit")


def without_weights(
    auto: Any, config: Any, name_or_path: str, dtype: torch.dtype, **options: Any
) -> Any:
    """The model of a config, in evaluation mode: its parameters are on the meta device, its buffers
    are the true ones. `auto` is the class of transformers that makes it. Raises ValueError.
    """
    if getattr(config, "quantization_config", None):
        raise ValueError("train.shard cannot load quantised weights; take the model as it was")

    # The model's own constructor computes its buffers; nothing is drawn for its weights.
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = auto.from_config(config, dtype=dtype, **options)
    model.tie_weights()

    in_float32 = getattr(model, "_keep_in_fp32_modules_strict", None)
    if in_float32 and dtype != torch.float32:
        raise ValueError(
            f"it keeps {', '.join(sorted(in_float32))} in float32, which train.shard cannot do beside "
            f"{str(dtype).removeprefix('torch.')}: set model.dtype=float32"
        )
    if model.can_generate():
        with suppress(OSError):  # the model may have none of its own
            model.generation_config = GenerationConfig.from_pretrained(name_or_path)
    return model.eval()


@dataclass
class Filling:
    """How some parameters come out of the files: one tensor as it is, or several converted."""

    targets: list[str]
    sources: list[Stored] = field(default_factory=list)
    converter: WeightConverter | None = None


class Weights:
    """Where the weights of a model on the meta device lie. Made before adapters and shards change
    the model's names; `fill` then gives each parameter, wherever it is, its content.
    """

    def __init__(self, model: Any, name_or_path: str, revision: str | None = None) -> None:
        self.model = model
        self.name = name_or_path
        self.owned = named_owned(model)
        self.buffers = dict(model.named_buffers())
        files = weight_files(_folder(name_or_path, revision))
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise ModelError(
                f"model.name_or_path: train.shard reads safetensors files, of which {name_or_path} "
                "has none; save the model anew with save_pretrained"
            )
        self.tensors = StoredTensors(files)
        self.fillings = self._planned()

    def fill(self, device: torch.device | str) -> None:
        """Read this process's part of every parameter, which gets its memory on `device`. Raises
        ModelError for weights that are missing or have another shape.
        """
        filled: set[int] = set()
        for filling in self.fillings.values():
            try:
                if filling.converter is None:
                    self._read(filling.targets[0], filling.sources[0], device, filled)
                else:
                    self._convert(filling, device, filled)
            except (ValueError, RuntimeError, KeyError) as error:
                raise ModelError(
                    f"model.name_or_path: {filling.targets[0]} cannot be read from {self.name}: {error}"
                ) from error

        missing = [name for name, one in self.owned.items() if id(one) not in filled]
        if missing:
            raise ModelError(
                f"model.name_or_path: the files of {self.name} lack {len(missing)} weights of the "
                f"model, the first is {missing[0]}; train.shard makes none up"
            )

    def fill_buffers(self) -> None:
        """Read the buffers that the files hold, and no parameter."""
        for filling in self.fillings.values():
            if filling.targets[0] not in self.owned:
                filling.sources[0].read_into(self.buffers[filling.targets[0]])

    def _planned(self) -> dict[str, Filling]:
        """What is read for which parameter, by the first one that a conversion gives."""
        state = self.model.state_dict()
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix = self.model.base_model_prefix
        fillings: dict[str, Filling] = {}
        unused = []

        for key in sorted(self.tensors, key=_natural):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = key, None
            if name not in state:
                unused.append(key)
                continue

            filling = fillings.setdefault(name, Filling([name]))
            filling.sources.append(self.tensors.stored(key))
            if pattern is not None:
                filling.converter = filling.converter or copy.deepcopy(by_pattern[pattern])
                source = self.tensors.stored(key)
                # It is read when the converter asks for it.
                filling.converter.add_tensor(name, key, pattern, cast(Any, source.whole))

        self.model._weight_conversions = [entry for entry in mapping if entry.was_used()]
        _note_unused(self.model, unused, self.name)
        return fillings

    def _read(
        self, name: str, source: Stored, device: torch.device | str, filled: set[int]
    ) -> None:
        one = self.owned.get(name)
        if one is None:
            source.read_into(self.buffers[name])
            return
        _check_shape(source.shape, one.parameter)
        part = one.on_device(device)
        if id(one) in filled:
            _check_tied(name, source, one.parameter, part)
        source.read_into(one.parameter)
        filled.add(id(one))

    def _convert(self, filling: Filling, device: torch.device | str, filled: set[int]) -> None:
        """Convert one group of tensors whole, and keep this process's part of the result."""
        assert filling.converter is not None
        values = filling.converter.convert(
            filling.targets[0], model=self.model, config=self.model.config
        )
        for name, value in values.items():
            one = self.owned[name]
            value = value[0] if isinstance(value, list) else value
            _check_shape(value.shape, one.parameter)
            part = one.on_device(device)
            region = Region.of(one.parameter)
            whole = Region((0,) * value.dim(), tuple(value.shape))
            part.copy_(value[region.within(whole)])
            filled.add(id(one))


def _folder(name_or_path: str, revision: str | None) -> Path:
    """The model's files on this machine; those of a hub name are loaded down first."""
    if not Path(name_or_path).expanduser().is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            patterns = ["*.safetensors", "*.json"]
            return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=patterns))
        except LocalEntryNotFoundError:
            pass  # without a network the files that are there have to do
    return model_folder(name_or_path, revision)


def _check_shape(shape: torch.Size, parameter: Tensor) -> None:
    if shape != parameter.shape:
        raise ValueError(f"it has the shape {list(shape)}, the model's is {list(parameter.shape)}")


def _check_tied(name: str, source: Stored, parameter: Tensor, part: Tensor) -> None:
    """ValueError where the files hold two different weights for one that the config ties."""
    second = torch.empty_like(part, device="cpu")
    source.read_region(Region.of(parameter), second)
    if not torch.equal(second, part.cpu()):
        raise ValueError("the config ties it to another weight, but the files hold another value")


def _natural(key: str) -> list[tuple[int, int, str]]:
    """Sorts layer 2 before layer 10: experts are stacked in this order."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"[.]", key)
    ]


def _note_unused(model: Any, unused: list[str], name: str) -> None:
    """Say which tensors of the files the model has no use for, but for those it knows of."""
    known = [*(model._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq"]
    strange = [key for key in unused if not any(re.search(pattern, key) for pattern in known)]
    if strange:
        log.warning(
            "%s holds %d tensors that the model has no use for, such as %s",
            name,
            len(strange),
            strange[0],
        )


@contextmanager
def as_if_loaded(model: nn.Module) -> Iterator[None]:
    """Inside the block the parameters stand on the CPU, as one number each that looks like all:
    peft then makes adapters as it would on the loaded model, with the same random numbers.
    """
    before = [(one, one.parameter) for one in owned(model)]
    for one, parameter in before:
        stand_in = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        _put(one, nn.Parameter(stand_in, requires_grad=parameter.requires_grad))
    try:
        yield
    finally:
        for one, parameter in before:
            parameter.requires_grad_(one.parameter.requires_grad)
            _put(one, parameter)


def _put(one: Owned, parameter: nn.Parameter) -> None:
    for module, name in one.places:
        module._parameters[name] = parameter
