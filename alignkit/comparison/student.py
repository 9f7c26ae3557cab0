"""The student of `alignkit iterate`: a small reward model that proposes the pairs of each round and
learns from the labels that the recipe's rewards give them (TS-Align, Zhang et al. 2024,
arXiv:2405.20215). Imports no torch.
"""

from pathlib import Path
from typing import Any

from alignkit.comparison.grid import Point
from alignkit.config.data import DataConfig
from alignkit.config.iterate import StudentConfig
from alignkit.config.model import check_reward_model
from alignkit.config.recipe import Recipe, recipe_of
from alignkit.config.train import TrainConfig
from alignkit.errors import ConfigError
from alignkit.runs.checks import check_without_torch

KEYS = ("iterate", "pairs", "student")


def student_section(recipe: Recipe) -> StudentConfig | None:
    """The recipe's section on the student, if it has one."""
    pairs = recipe.iterate and recipe.iterate.pairs
    return pairs.student if pairs else None


def student_before(recipe: Recipe, number: int) -> str | None:
    """The reward model that proposes the pairs of round `number`, counted from 1; None without one."""
    section = student_section(recipe)
    if section is None:
        return None
    if section.train is None or number == 1:
        return section.model
    return str(_folder(recipe, number - 1) / "model")


def student_run(recipe: Recipe, point: Point) -> Point | None:
    """The run in which the student learns the labels of the round `point`; None where none does."""
    section = student_section(recipe)
    if section is None or section.train is None:
        return None

    number = int(point.swept["round"])
    # Its seed is as far from its own first one as the round's is.
    train = section.train.model_copy(
        update={"seed": section.train.seed + point.seed - recipe.train.seed}
    )
    rows = point.recipe.data.model_copy(update={"eval": None})
    trained = _recipe_of_run(recipe, number, train, rows)
    return Point(f"student-{number}", "student", {"round": number}, train.seed, trained)


def check_student(recipe: Recipe, safe: bool) -> None:
    """Refuse a student that is not there, and settings of its training that cannot be. ConfigError or
    ModelError.
    """
    section = student_section(recipe)
    if section is None:
        return
    field = ".".join((*KEYS, "model"))
    check_reward_model(section.model, field)
    if section.train is None:
        return

    from alignkit.policies.reward_head import has_reward_head  # imports torch

    # Its rows are not there yet.
    check_without_torch(_recipe_of_run(recipe, 1, section.train, DataConfig()), safe)
    if has_reward_head(section.model):
        raise ConfigError(
            f"{field}: {section.model} is a language model with a reward head beside it, which cannot "
            "be trained on; give a model that `reward_model` has trained, or leave "
            f"`{'.'.join(KEYS)}.train` out"
        )


def _recipe_of_run(recipe: Recipe, number: int, train: TrainConfig, rows: DataConfig) -> Recipe:
    """The recipe by which the student learns in round `number`. ConfigError where the settings do not
    fit together.
    """
    sections: dict[str, Any] = {
        "model": {"name_or_path": student_before(recipe, number)},
        "data": rows.model_dump(mode="json"),
        "objective": {"name": "reward_model"},
        "train": train.model_dump(mode="json"),
        "output_dir": str(_folder(recipe, number)),
    }
    return recipe_of(sections, recipe.origin, KEYS)


def _folder(recipe: Recipe, number: int) -> Path:
    return Path(recipe.output_dir).expanduser() / f"student-{number}"
