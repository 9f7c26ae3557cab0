"""A finished run of `token_value`, ready to decode with."""

from pathlib import Path
from typing import Any

from alignkit.config.objective import build_objective
from alignkit.config.recipe import load_recipe
from alignkit.decoding.value import ValueHead
from alignkit.errors import ConfigError, ModelError
from alignkit.policies.bins import load_bins
from alignkit.policies.head import Head
from alignkit.policies.module import causal_lm
from alignkit.rollout.generate import OneModel
from alignkit.runs.trained_model import find_finished, load_finished


def load_value(name: str, beta: float) -> OneModel:
    """The value that a finished run of `token_value` learned, at `beta`, in the place of a model.

    ModelError for what is no such run, or a model whose head does more than multiply.
    """
    folder = Path(name).expanduser()
    recipe_file = folder / "recipe.yaml"
    objective: Any = None
    if recipe_file.is_file():
        recipe = load_recipe(recipe_file)
        objective = build_objective(recipe.objective, recipe.origin, safe=True)
    if objective is None or not objective.plan.bins:
        raise ModelError(
            f"{name} is no run that learned a value; give the run folder of a recipe with the "
            "objective token_value"
        )

    loaded = load_finished(name)
    network: Any = loaded.network
    head = Head.of(causal_lm(network))
    if causal_lm(network) is not network or head.scale != 1 or head.soft_cap is not None:
        raise ConfigError(
            f"{name}: a learned value is read from a whole model whose head only multiplies; train "
            "it without an adapter, on another architecture where its logits are scaled or capped"
        )

    embedding = network.get_input_embeddings().weight.detach().clone()
    bins = load_bins(find_finished(name), embedding.shape[1], embedding.device)
    value = ValueHead(bins, embedding, low=objective.low, high=objective.high, beta=beta)
    network.set_output_embeddings(value)
    return loaded
