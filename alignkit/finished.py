"""Finished models, however they are named, ready to sample from."""

from pathlib import Path

import torch

from alignkit.errors import ModelError
from alignkit.policies.config import ModelConfig
from alignkit.policies.load import load_model, load_tokenizer
from alignkit.rollout.text import OneModel
from alignkit.tasks import resolve


def load_finished(name: str) -> OneModel:
    """The model of a run folder, a model or adapter folder, a hub name or `task:NAME` (its base model), with its tokenizer.

    On a GPU where there is one. Raises ModelError where there is no model, or a run has not finished.
    """
    folder = resolve(name).model_folder if name.startswith("task:") else Path(name).expanduser()
    if (folder / "recipe.yaml").is_file():  # a run folder
        folder = folder / "model"
        if not folder.is_dir():
            raise ModelError(f"the run {name} has not finished, it has no model/ yet; go on with --resume auto")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = ModelConfig(name_or_path=str(folder) if folder.exists() else name)
    if not (folder / "adapter_config.json").is_file():
        network, _ = load_model(config, device=device)
        return OneModel(network, load_tokenizer(config))
    from peft import PeftConfig, PeftModel

    base = config.model_copy(update={"name_or_path": PeftConfig.from_pretrained(folder).base_model_name_or_path})
    network, _ = load_model(base, device=device)
    tokenizer = load_tokenizer(config if (folder / "tokenizer_config.json").is_file() else base)
    return OneModel(PeftModel.from_pretrained(network, folder).eval(), tokenizer)
