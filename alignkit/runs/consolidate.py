"""A checkpoint's weights as a model that `from_pretrained` loads, never whole in memory."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignkit import files
from alignkit.config.recipe import load_recipe
from alignkit.errors import CheckpointError, ResourceError
from alignkit.policies.adapters import add_adapter
from alignkit.policies.export import dtype_to_save, save_adapter, with_fields
from alignkit.policies.load import load_without_weights
from alignkit.policies.meta import as_if_loaded
from alignkit.policies.sharded_export import live_tensors, plan_files, save_config, write_file
from alignkit.policies.slices import StoredTensors
from alignkit.policies.tokenizer import load_tokenizer
from alignkit.runs.launch import resolve_task
from alignkit.training import checkpoint

INNER = "model."  # what stands before the model's own names in a checkpoint


def consolidate(run: Path, out: Path) -> int:
    """Write the weights of the run's newest whole checkpoint to the folder `out`, which appears
    whole or not at all; the step of that checkpoint.

    Weights are those of the run's average where it keeps one. CheckpointError where the run has no
    checkpoint that is whole, ResourceError where the disk refuses or `out` is there already.
    """
    if out.exists():
        raise ResourceError(f"{out} is there already; name a folder that does not exist")
    saved, _ = checkpoint.newest(run / "checkpoints")
    if saved is None:
        raise CheckpointError(f"{run} holds no checkpoints to make a model of")
    stored = saved.tensors.get("average", saved.tensors["policy"])

    recipe = load_recipe(run / "recipe.yaml")
    model = recipe.model
    task = resolve_task(recipe)
    if task is not None and model.name_or_path == "task":
        model = model.model_copy(update={"name_or_path": str(task.model_folder)})

    loaded, dropout, weights = load_without_weights(model)
    with files.writing(out), files.replaced_folder(out) as temporary:
        with with_fields(loaded.config, dropout):
            if model.adapter is None:
                weights.fill_buffers()
                _write_model(loaded, temporary, stored, dtype_to_save(model))
            else:
                with as_if_loaded(loaded):
                    adapted = add_adapter(loaded, model.adapter, seed=recipe.train.seed)
                _write_adapter(adapted, temporary, stored)
        load_tokenizer(model).save_pretrained(temporary)
        content = checkpoint.manifest_content(saved.identity)
        files.write_manifest(temporary, content, without=["README.md"])
    return saved.step


def _write_model(model: Any, folder: Path, stored: StoredTensors, dtype: torch.dtype) -> None:
    """Write a model tensor by tensor."""
    live = live_tensors(model)

    def kind(tensor: Tensor) -> torch.dtype:
        return dtype if tensor.is_floating_point() else tensor.dtype

    def whole(name: str) -> Tensor:
        key = INNER + name
        tensor = stored[key] if key in stored else live[name]
        if tensor.is_meta:
            raise CheckpointError(f"the checkpoint has no {name}; it belongs to another model")
        return tensor.to(kind(tensor))

    shapes = {
        name: torch.empty(tensor.shape, dtype=kind(tensor), device="meta")
        for name, tensor in live.items()
    }
    plan = plan_files(model, shapes)
    save_config(model, folder, dtype, plan)
    for file in plan:
        refusal = write_file(model, folder, file, whole, writes=True)
        if refusal is not None:
            raise refusal


def _write_adapter(model: Any, folder: Path, stored: StoredTensors) -> None:
    """Write the adapter alone, in peft's layout."""
    state = {name: value for name, value in model.state_dict().items() if not value.is_meta}
    for name in state.keys() & {key.removeprefix(INNER) for key in stored}:
        state[name] = stored[INNER + name]
    save_adapter(model, folder, state)
