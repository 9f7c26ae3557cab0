"""Finished models, however they are named, ready to sample from. Importing this imports no torch."""

from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.config.model import ModelConfig
from alignkit.errors import ModelError
from alignkit.tasks import resolve

if TYPE_CHECKING:
    from alignkit.rollout.generate import OneModel


def find_finished(name: str) -> Path:
    """The folder of the model called `name`: a run's `model`, a model or adapter folder, or a
    task's base model (made on first use). A path that does not exist stands for a hub name.

    ModelError for a run that has not finished and for a folder that is missing.
    """
    folder = resolve(name).model_folder if name.startswith("task:") else Path(name).expanduser()

    is_run = (folder / "recipe.yaml").is_file()
    if is_run:
        folder = folder / "model"
    if is_run and not folder.is_dir():
        raise ModelError(
            f"the run {name} has not finished, it has no model/ yet; go on with --resume auto"
        )

    # A name whose parent folder exists was meant as a path, not as a hub name.
    if not folder.exists() and folder.parent != Path() and folder.parent.is_dir():
        raise ModelError(
            f"there is no folder {name}; give a run folder, a model folder, a hub name or task:NAME"
        )
    return folder


def load_finished(name: str) -> "OneModel":
    """The model of a run folder, a model or adapter folder, a hub name or `task:NAME` (its base
    model), with its tokenizer; on a GPU where there is one.

    ModelError where there is no model, a run has not finished, or files do not match the hashes
    that were saved with them; CheckpointError where an adapter's base model has been replaced.
    """
    import torch

    from alignkit.policies.load import load_frozen
    from alignkit.rollout.generate import OneModel

    folder = find_finished(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = ModelConfig(name_or_path=str(folder) if folder.exists() else name)
    network, tokenizer = load_frozen(config, "model", device=device)
    return OneModel(network, tokenizer)
