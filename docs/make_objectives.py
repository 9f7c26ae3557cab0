"""Writes docs/objectives.md, the list of objectives, and alignkit/objectives/fields.json, what their
fields may be, from the registry.

python docs/make_objectives.py
"""

import json
from importlib import import_module
from pathlib import Path

from alignkit import divergences
from alignkit.config.objective_fields import NAMES, REFUSED, TABLE, schema_of
from alignkit.config.recipe import shipped_recipes
from alignkit.objectives import FUNCTIONS, OBJECTIVES, locate
from alignkit.objectives.base import Objective

PAGE = Path(__file__).with_name("objectives.md")

# folder of `alignkit.objectives` -> heading and a sentence of introduction
FOLDERS = {
    "preference": (
        "Preference optimisation",
        "Most of these learn from a fixed data set: pairs, demonstrations or labelled completions. "
        "A few sample beside it, or score what the reference samples.",
    ),
    "online": (
        "Online reinforcement learning",
        "These sample their own completions during training and learn from a reward.",
    ),
    "self_play": (
        "Self-play",
        "These sample their own completions and learn from a judge that compares two of them. "
        "[Self-play](self_play.md) says which one to take.",
    ),
    "distillation": (
        "Distillation",
        "These learn from a teacher: the model that the recipe's `teacher` section names.",
    ),
    "reward": (
        "Reward and preference models",
        "These train a model that scores or compares completions, to be used as a reward or a "
        "judge. [Reward models](preference_models.md) says how.",
    ),
}
FAMILIES = {
    "sequence": "demonstrations",
    "pair": "pairs",
    "ranked": "rankings",
    "labelled": "labelled completions",
    "rollout": "samples with a reward",
    "game": "samples with a judge",
}

HEAD = """# Objectives

alignkit has {count} objectives. Each is one file under `alignkit/objectives/`, with a pure loss function where it needs one of
its own and a class around it that holds the hyper-parameters. The name in the first column is what a recipe calls it
(`objective: {{name: dpo}}`); most have a shipped recipe of the same name, which `alignkit train NAME` runs as it is on an embedded
task. The losses are imported from `alignkit.losses`, the classes from `alignkit`. `alignkit verify NAME` checks an objective
against exact answers.

In the equations `w` is the chosen completion, `l` the rejected one and `y` any other; `pi` is the policy and `ref` the reference,
so that `pi(w)/ref(w)` is a ratio of probabilities; `SG` stops the gradient. `docs/make_objectives.py` wrote this page from the registry.
"""

FUNCTIONS_HEAD = "These are in `alignkit.losses` for loops and trainers of your own."


def folder_of(name: str) -> str:
    """`dpo` -> "preference": the folder that an objective's file is in."""
    return locate(name)[0].removeprefix("alignkit.objectives.").split(".")[0]


def objective_class(name: str) -> type[Objective]:
    """The class of a registered objective."""
    module, cls, _ = locate(name)
    return getattr(import_module(module), cls)


def overview(names: list[str]) -> list[str]:
    """A table with one line per objective."""
    recipes = shipped_recipes()
    lines = [
        "| name | class | learns from | recipe | loss functions |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        _, cls, functions = locate(name)
        family = FAMILIES[objective_class(name)().plan.data]
        losses = ", ".join(f"`{function}`" for function in functions.split(",") if function)
        recipe = f"`{name}.yaml`" if name in recipes else ""
        lines.append(f"| `{name}` | `{cls}` | {family} | {recipe} | {losses} |")
    return lines


def sources(names: list[str]) -> list[str]:
    """The paper and the equation of each objective, as a list."""
    lines = []
    for name in names:
        cls = objective_class(name)
        lines += [f"- **`{name}`**: {cls.paper}", "", f"    `{cls.equation}`", ""]
    return lines


def without_objective() -> list[str]:
    """A table of the functions of `alignkit.losses` that no class of the registry uses."""
    lines = ["| function | what it is |", "|---|---|"]
    for name, module in FUNCTIONS.items():
        function = getattr(import_module(f"alignkit.objectives.{module}"), name)
        paragraph = (function.__doc__ or "").partition("\n\n")[0]
        lines.append(f"| `{name}` | {' '.join(paragraph.split()).replace('|', '&#124;')} |")
    return lines


def make_page() -> str:
    """The whole page."""
    lines = [HEAD.format(count=len(OBJECTIVES))]
    for folder, (title, introduction) in FOLDERS.items():
        names = [name for name in OBJECTIVES if folder_of(name) == folder]
        lines += [f"## {title}", "", introduction, "", *overview(names), "", *sources(names)]
    if FUNCTIONS:
        lines += ["## Functions without a recipe", "", FUNCTIONS_HEAD, "", *without_objective()]
    return "\n".join(lines).rstrip() + "\n"


def settled_family(cls: type[Objective]) -> str | None:
    """The data family of an objective; None where a field decides, as `share` of `distill` does."""
    families = {cls().plan.data}
    for field, schema in schema_of(cls).items():
        limits = [schema[key] for key in ("minimum", "maximum") if key in schema]
        for value in [*schema.get("enum", []), *limits]:
            try:
                families.add(cls(**{field: value}).plan.data)
            except ValueError:  # it needs another field to be changed too
                continue
    return families.pop() if len(families) == 1 else None


def make_table() -> str:
    """The table of families and fields as JSON, one objective per line."""
    lines = []
    for name in OBJECTIVES:
        cls = objective_class(name)
        fields = schema_of(cls)
        if fields.get("divergence") == {"type": "string"}:
            fields["divergence"][NAMES] = list(divergences.names())
            fields["divergence"][REFUSED] = list(divergences.refused_names())
        entry = {"family": settled_family(cls), "fields": fields}
        lines.append(f"{json.dumps(name)}: {json.dumps(entry)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    PAGE.write_text(make_page())
    TABLE.write_text(make_table())
    print(f"wrote {PAGE} and {TABLE}: {len(OBJECTIVES)} objectives")
