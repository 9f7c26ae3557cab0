"""The model card that a run writes: what was trained, by which equation, on which data, with which result."""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

from alignkit.config import Recipe, dump_recipe
from alignkit.objectives.base import Objective, Weighted


def model_card(recipe: Recipe, objective: Objective, data: Sequence[str]) -> Callable[[Mapping[str, float]], str]:
    """Last metrics -> the card as Markdown with Hugging Face's front matter. `data` is the data report."""
    parts = list(objective.parts) if isinstance(objective, Weighted) else [(objective, 1.0)]

    def card(metrics: Mapping[str, float]) -> str:
        rows = [
            f"| {type(part).__name__} | {weight:g} | {_settings(part)} | `{part.equation}` | {part.paper} |"
            for part, weight in parts
        ]
        figures = [f"| {name} | {value:.6g} |" for name, value in metrics.items()]
        remote = ["Its base model runs code of its own (`trust_remote_code`)."] if recipe.model.trust_remote_code else []
        return "\n".join(
            [
                "---",
                "library_name: " + ("peft" if recipe.model.adapter else "transformers"),
                "tags: [alignkit]",
                "---",
                "",
                f"# {recipe.model.name_or_path}, trained with alignkit",
                "",
                *remote,
                "",
                "| objective | weight | settings | loss | paper |",
                "|---|---|---|---|---|",
                *rows,
                "",
                "## Data",
                "",
                "```",
                *data,
                "```",
                "",
                "## Results",
                "",
                "| metric | last value |",
                "|---|---|",
                *figures,
                "",
                "## Recipe",
                "",
                "```yaml",
                dump_recipe(recipe).rstrip(),
                "```",
                "",
                "Versions: " + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate")),
                "",
            ]
        )

    return card


def _settings(objective: Objective) -> str:
    return ", ".join(f"{name} = {value}" for name, value in objective.model_dump().items()) or "none"
