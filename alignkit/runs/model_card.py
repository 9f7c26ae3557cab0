"""The model card that a run writes: what was trained, by which equation, on which data, with which
result.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

from alignkit.config.recipe import Recipe, dump_recipe
from alignkit.objectives.base import Objective, Weighted


def model_card(
    recipe: Recipe, objective: Objective, data: Sequence[str]
) -> Callable[[Mapping[str, float]], str]:
    """Last metrics -> the card as Markdown with Hugging Face's front matter. `data` is the data
    report.
    """

    def card(metrics: Mapping[str, float]) -> str:
        blocks = [
            _front_matter(recipe),
            _objectives(objective),
            "## Data",
            _fenced("", data),
            "## Results",
            _table(
                ["metric", "last value"],
                [[name, f"{value:.6g}"] for name, value in metrics.items()],
            ),
            "## Recipe",
            _fenced("yaml", [dump_recipe(recipe).rstrip()]),
            "Versions: "
            + ", ".join(
                f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate")
            ),
        ]
        return "\n\n".join(blocks) + "\n"

    return card


def _front_matter(recipe: Recipe) -> str:
    library = "peft" if recipe.model.adapter else "transformers"
    title = f"# {recipe.model.name_or_path}, trained with alignkit"
    remote = (
        ["", "Its base model runs code of its own (`trust_remote_code`)."]
        if recipe.model.trust_remote_code
        else []
    )
    return "\n".join(
        ["---", f"library_name: {library}", "tags: [alignkit]", "---", "", title, *remote]
    )


def _objectives(objective: Objective) -> str:
    parts = objective.parts if isinstance(objective, Weighted) else [(objective, 1.0)]
    rows = [
        [type(part).__name__, f"{weight:g}", _settings(part), f"`{part.equation}`", part.paper]
        for part, weight in parts
    ]
    return _table(["objective", "weight", "settings", "loss", "paper"], rows)


def _settings(objective: Objective) -> str:
    return (
        ", ".join(f"{name} = {value}" for name, value in objective.model_dump().items()) or "none"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(row) for row in (header, *rows)]
    return "\n".join(
        [f"| {lines[0]} |", "|" + "---|" * len(header), *(f"| {line} |" for line in lines[1:])]
    )


def _fenced(language: str, lines: Sequence[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
