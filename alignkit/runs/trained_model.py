"""Finished models, however they are named, ready to sample from. Importing this imports no torch."""

from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.config.model import ModelConfig
from alignkit.errors import ModelError
from alignkit.tasks import resolve

if TYPE_CHECKING:
    from alignkit.rollout.generate import OneModel


def find_finished(name: str) -> Path:
    """Where the model called `name` is: a run's `model`, a model or adapter folder, a task's base
    model (made on first use), or a path that is not there: a hub name. Raises ModelError for a run
    that has not finished and a folder that is missing.
    """
    folder = resolve(name).model_folder if name.startswith("task:") else Path(name).expanduser()
    if (folder / "recipe.yaml").is_file():  # a run folder
        folder = folder / "model"
        if not folder.is_dir():
            raise ModelError(
                f"the run {name} has not finished, it has no model/ yet; go on with --resume auto"
            )
    if not folder.exists() and folder.parent != Path() and folder.parent.is_dir():
        raise ModelError(
            f"there is no folder {name}; give a run folder, a model folder, a hub name or task:NAME"
        )
    return folder


def load_finished(name: str) -> "OneModel":
    """The model of a run folder, a model or adapter folder, a hub name or `task:NAME` (its base
    model), with its tokenizer.

    On a GPU where there is one. Raises ModelError where there is no model, or a run has not
    finished.
    """
    import torch

    from alignkit.policies.load import load_model, load_tokenizer
    from alignkit.rollout.generate import OneModel

    folder = find_finished(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = ModelConfig(name_or_path=str(folder) if folder.exists() else name)
    if not (folder / "adapter_config.json").is_file():
        network, _ = load_model(config, device=device)
        return OneModel(network, load_tokenizer(config))
    from peft import PeftConfig, PeftModel

    base = config.model_copy(
        update={"name_or_path": PeftConfig.from_pretrained(folder).base_model_name_or_path}
    )
    network, _ = load_model(base, device=device)
    tokenizer = load_tokenizer(config if (folder / "tokenizer_config.json").is_file() else base)
    return OneModel(PeftModel.from_pretrained(network, folder).eval(), tokenizer)
