"""The model card that a run writes: what was trained, by which
equation, on which data and with which result.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from alignkit.config.escaping import fenced, markdown_cell, markdown_line
from alignkit.config.hub import HUB_NAME
from alignkit.config.recipe import Recipe, dump_recipe
from alignkit.objectives.base import Objective, Weighted
from alignkit.objectives.streams import Streams


def model_card(
    recipe: Recipe, objective: Objective, data: Sequence[str]
) -> Callable[[Mapping[str, float]], str]:
    """Last metrics -> the card as Markdown with Hugging Face's front matter. `data` is the data
    report, line by line.
    """

    def card(metrics: Mapping[str, float]) -> str:
        results = [[name, f"{value:.6g}"] for name, value in metrics.items()]
        libraries = ("torch", "transformers", "accelerate")
        versions = ", ".join(f"{name} {version(name)}" for name in libraries)

        blocks = [
            _front_matter(recipe, objective),
            _objectives(objective),
            "## Data",
            fenced("", data),
            "## Results",
            _table(["metric", "last value"], results),
            "## Recipe",
            fenced("yaml", [dump_recipe(recipe).rstrip()]),
            f"Versions: {versions}",
        ]
        return "\n\n".join(blocks) + "\n"

    return card


def _front_matter(recipe: Recipe, objective: Objective) -> str:
    """The header in the hub's format, and the title."""
    adapted = recipe.model.adapter is not None
    # Reward and preference models are sequence classifiers.
    task = "text-classification" if objective.plan.outputs else "text-generation"
    header: dict[str, Any] = {
        "library_name": "peft" if adapted else "transformers",
        "pipeline_tag": task,
        "tags": ["alignkit", *(type(part).__name__.lower() for part, _ in _parts(objective))],
    }
    # The hub knows names, and no paths of this machine.
    if _on_the_hub(recipe.model.name_or_path):
        header["base_model"] = recipe.model.name_or_path
        header["base_model_relation"] = "adapter" if adapted else "finetune"
    sources = dict.fromkeys(source.source for source in recipe.data.sources())
    datasets = [source for source in sources if _on_the_hub(source)]
    if datasets:
        header["datasets"] = datasets

    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {markdown_line(recipe.model.name_or_path)}, trained with alignkit",
    ]
    if recipe.model.trust_remote_code:
        lines += ["", "Its base model runs code of its own (`trust_remote_code`)."]
    return "\n".join(lines)


def _on_the_hub(name: str) -> bool:
    """Whether a name of a model or of a data set is one of the hub's."""
    return bool(HUB_NAME.fullmatch(name)) and name != "task" and not Path(name).exists()


def _parts(objective: Objective) -> Sequence[tuple[Objective, float]]:
    if isinstance(objective, Streams):
        return [(stream.objective, stream.weight) for stream in objective.streams]
    return objective.parts if isinstance(objective, Weighted) else [(objective, 1.0)]


def _objectives(objective: Objective) -> str:
    rows = [
        [type(part).__name__, f"{weight:g}", _settings(part), f"`{part.equation}`", part.paper]
        for part, weight in _parts(objective)
    ]
    return _table(["objective", "weight", "settings", "loss", "paper"], rows)


def _settings(objective: Objective) -> str:
    settings = [f"{name} = {value}" for name, value in objective.model_dump().items()]
    return ", ".join(settings) or "none"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = "|" + "---|" * len(header)
    body = [f"| {' | '.join(markdown_cell(cell) for cell in row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(header)} |", rule, *body])
