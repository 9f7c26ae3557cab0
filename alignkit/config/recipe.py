"""The recipe: all sections of one run, and how it is found, read, checked and written.

Imports no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import Field, PrivateAttr

from alignkit.config.compare import CompareConfig
from alignkit.config.data import DataConfig
from alignkit.config.hub import HubConfig
from alignkit.config.iterate import IterateConfig
from alignkit.config.judges import JudgeConfig
from alignkit.config.model import ModelConfig, ReferenceConfig, TargetConfig
from alignkit.config.objective import DEFAULT_OBJECTIVE, Part, check_section
from alignkit.config.rewards import RewardConfig
from alignkit.config.rollout import RolloutConfig
from alignkit.config.row_sources import rows_by_share
from alignkit.config.section import Section
from alignkit.config.teacher import TeacherConfig
from alignkit.config.text import Keys, Origin, read_recipe
from alignkit.config.train import TrainConfig
from alignkit.config.validation import nearest, validated
from alignkit.errors import ConfigError

Tracker = Literal[
    "all",
    "aim",
    "clearml",
    "comet_ml",
    "dvclive",
    "mlflow",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
]
REFERENCES = ("auto", "frozen", "adapter_off", "cached", "ema", "synced")


class Recipe(Section):
    """One run. Every field has a default that works on the embedded task."""

    model: ModelConfig = ModelConfig()
    reference: ReferenceConfig = ReferenceConfig()
    target: TargetConfig | None = Field(
        None, description="a second anchor, for the objectives that ask for one"
    )
    teacher: TeacherConfig | None = Field(
        None, description="the model that objectives of distillation learn from"
    )
    data: DataConfig = DataConfig()
    objective: Part | Annotated[list[Part], Field(min_length=1)] = Field(
        DEFAULT_OBJECTIVE,
        description="`name` or `import` with the hyper-parameters; "
        "a list of these, each with a `weight`, is a weighted sum",
    )
    train: TrainConfig = TrainConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: list[RewardConfig] = Field(
        [], description="rewards of online objectives; their weighted sum is what counts"
    )
    judge: JudgeConfig | None = Field(None, description="the judge of self-play objectives")
    compare: CompareConfig | None = Field(None, description="read by `alignkit compare` only")
    iterate: IterateConfig | None = Field(None, description="read by `alignkit iterate` only")
    trackers: list[Tracker] = Field(
        [], description="experiment trackers to use beside metrics.jsonl, through accelerate"
    )
    hub: HubConfig | None = Field(
        None, description="push the finished model to the hub: {push: NAME, private: true}"
    )
    output_dir: Annotated[str, Field(min_length=1)] = Field(
        "runs/{recipe}", description="the run folder; {recipe} stands for the recipe's file name"
    )

    _origin: Origin = PrivateAttr(default_factory=Origin)

    def objectives(self) -> list[tuple[Keys, Part | list[Part]]]:
        """The objective's section with the keys that lead to it, or those of all streams."""
        if not self.data.has_streams:
            return [(("objective",), self.objective)]
        assert not isinstance(self.data.train, str)
        return [
            (("data", "train", str(place), "objective"), source.objective)
            for place, source in enumerate(self.data.train)
            if source.objective is not None and source.share
        ]

    @property
    def origin(self) -> Origin:
        """Where each field was written, for faults that are noticed later."""
        return self._origin


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a file, or by the bare name of one that ships with
    the package, with `section.field=value` overrides.

    Raises ConfigError that names every fault with its file and line (or its override), what is
    allowed and the nearest valid name. What only an objective's class knows is checked by
    `build_objective`.
    """
    path = find_recipe(recipe)
    data, origin = read_recipe(path, overrides, defaults={"objective": dict(DEFAULT_OBJECTIVE)})
    loaded = recipe_of(data, origin)
    for keys, section in loaded.objectives():
        check_section(section, origin, keys)

    output_dir = _output_dir(loaded.output_dir, path, origin)
    loaded = loaded.model_copy(update={"output_dir": output_dir})
    loaded._origin = origin
    return loaded


def recipe_of(sections: Mapping[str, Any], origin: Origin, at: tuple[str, ...] = ()) -> Recipe:
    """The recipe that is made of these sections, checked field by field and across fields. `at` is
    where the sections stand in what `origin` knows. ConfigError.
    """
    recipe = validated(Recipe, sections, origin, at)
    _check_across_fields(recipe, lambda *keys: origin.at((*at, *keys)))
    recipe._origin = origin
    return recipe


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package
    (installed: `alignkit/configs`; checkout: `configs`).
    """
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    folder = installed if installed.is_dir() else package.parent / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe given as a path or as the bare name of a shipped one."""
    path = Path(recipe)
    shipped = shipped_recipes()
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    if path.is_file():
        return path

    if path.suffix in (".yaml", ".yml") or len(path.parts) != 1:
        raise ConfigError(f"there is no recipe file {path}")
    hint = nearest(str(recipe), shipped)
    raise ConfigError(f"there is no recipe `{recipe}`.{hint} Shipped: {', '.join(shipped)}")


def dump_recipe(recipe: Recipe) -> str:
    """YAML of every field; reading it gives the same recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(mode="json")))


def _check_across_fields(recipe: Recipe, at: Callable[..., str]) -> None:
    """Refuse values that are fine one by one but not together. `at` says where a field stands."""
    if recipe.train.steps is None and recipe.train.epochs is None:
        raise ConfigError(
            f"{at('train', 'steps')}: `train.steps` and `train.epochs` are both null; give one"
        )

    # A reference that is no kind is a path. One that nearly spells a kind is a slip of the keys.
    kind = recipe.reference.kind
    hint = nearest(kind, REFERENCES)
    if kind not in REFERENCES and hint and not Path(kind).expanduser().exists():
        raise ConfigError(
            f"{at('reference', 'kind')}: `reference.kind` is `{kind}`, neither a kind nor a path.{hint}"
        )

    mesh = recipe.train.mesh
    if mesh is not None and mesh.tensor > 1 and recipe.model.adapter is not None:
        raise ConfigError(
            f"{at('train', 'mesh', 'tensor')}: `train.mesh.tensor` is {mesh.tensor}, and a model with "
            "an adapter cannot be cut by its tp_plan; leave `tensor` out, or `model.adapter`"
        )

    budgets = recipe.rollout.allocate
    if budgets is not None and budgets.norm == "head" and recipe.train.shard:
        raise ConfigError(
            f"{at('rollout', 'allocate', 'norm')}: `rollout.allocate.norm: head` reads the head as a "
            "whole, and `train.shard` spreads it over the processes; take norm: one"
        )

    _check_splits_of_tasks(recipe, at)
    if recipe.data.has_streams:
        _check_streams(recipe, at)


def _check_streams(recipe: Recipe, at: Callable[..., str]) -> None:
    """Streams count steps, as each has epochs of its own, and every one has a row in each step."""
    if recipe.train.epochs is not None:
        raise ConfigError(
            f"{at('train', 'epochs')}: `train.epochs` has no meaning for streams, each of which has "
            "epochs of its own; give train.steps"
        )
    streams = recipe.data.sources()
    rows = rows_by_share([stream.share or 0 for stream in streams], recipe.train.batch_size)
    for stream, count in zip(streams, rows):
        if not count:
            raise ConfigError(
                f"{at('train', 'batch_size')}: the share of stream `{stream.stream_name}` is no row of "
                f"a step of {recipe.train.batch_size}; raise train.batch_size or its share"
            )


def _check_splits_of_tasks(recipe: Recipe, at: Callable[..., str]) -> None:
    """A task's rows are what its train and eval are; another split would be left unread."""
    data = recipe.data
    held_out = list(data.held_out_sources().values())
    settings = [
        ("eval_split", data.eval_split not in (None, "eval"), held_out),
        ("eval_subset", data.eval_subset is not None, held_out),
        ("split", data.split != "train", [*data.sources(), *held_out]),
        ("subset", data.subset is not None, [*data.sources(), *held_out]),
    ]
    for field, is_asked, rows in settings:
        tasks = [row.source for row in rows if row.source.startswith("task:")]
        if is_asked and tasks and len(tasks) == len(rows):
            raise ConfigError(
                f"{at('data', field)}: {tasks[0]} has its own rows to train on and to hold "
                f"out, and no other splits or subsets; leave out `data.{field}`"
            )


def _output_dir(given: str, recipe: Path, origin: Origin) -> str:
    """The run folder with `{recipe}` filled in.

    A recipe file may not climb out of the working directory with `..`. An override was typed by the
    user and may go anywhere; it becomes absolute, so that the resolved recipe can be read again.
    """
    if recipe.stem.startswith("."):
        raise ConfigError(
            f"{recipe}: the name of a recipe is the name of its run folder and "
            "cannot start with a dot; rename the file"
        )

    folder = Path(given.replace("{recipe}", recipe.stem)).expanduser()
    if ".." not in folder.parts:
        return str(folder)

    place = origin.at(("output_dir",))
    if not place.startswith("override ") and not folder.resolve().is_relative_to(Path.cwd()):
        raise ConfigError(
            f"{place}: `output_dir` is {given}, outside {Path.cwd()}; "
            "use an absolute path or an override"
        )
    return str(folder.resolve())
