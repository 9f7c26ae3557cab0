"""The recipe: strict sections from YAML and dotted overrides. Imports no torch until an objective
is built.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PrivateAttr

from alignkit.config.compare import CompareConfig
from alignkit.config.data import DataConfig
from alignkit.config.judges import JudgeConfig
from alignkit.config.model import ModelConfig, ReferenceConfig, TargetConfig
from alignkit.config.plugins import load_object
from alignkit.config.rewards import RewardConfig
from alignkit.config.rollout import RolloutConfig
from alignkit.config.text import Keys, Origin, read_recipe
from alignkit.config.train import TrainConfig
from alignkit.config.validation import nearest, validated
from alignkit.errors import ConfigError
from alignkit.objectives import OBJECTIVES, locate

if TYPE_CHECKING:
    from alignkit.objectives.base import Objective

Section = dict[str, Any]
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
DEFAULT_OBJECTIVE: Section = {"name": "dpo", "beta": 0.1}
REFERENCES = ("auto", "frozen", "adapter_off", "cached", "ema", "synced")


class Recipe(BaseModel):
    """One run, whole: every field has a default that works on the embedded task, and unknown fields
    are errors.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )
    model: ModelConfig = ModelConfig()
    reference: ReferenceConfig = ReferenceConfig()
    target: TargetConfig | None = Field(
        None, description="a second anchor, for the objectives that ask for one"
    )
    data: DataConfig = DataConfig()
    objective: Section | Annotated[list[Section], Field(min_length=1)] = Field(
        DEFAULT_OBJECTIVE,
        description="name or import, with its hyper-parameters; a list of these with weights is a sum",
    )
    train: TrainConfig = TrainConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: list[RewardConfig] = Field([], description="rewards of online objectives, summed")
    judge: JudgeConfig | None = Field(None, description="the judge of self-play objectives")
    compare: CompareConfig | None = Field(None, description="read by `alignkit compare` only")
    trackers: list[Tracker] = Field(
        [], description="experiment trackers beside metrics.jsonl, through accelerate"
    )
    output_dir: Annotated[str, Field(min_length=1)] = Field(
        "runs/{recipe}", description="the run folder; {recipe} stands for the recipe's file name"
    )

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def origin(self) -> Origin:
        """Where each field was written, for errors that are found later."""
        return self._origin


class Weight(BaseModel):
    """The `weight` of one part of a weighted list."""

    weight: PositiveFloat = 1.0


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a file, or by the bare name of one that ships with the package, with
    `section.field=value` overrides.

    Raises ConfigError that names every fault with its file and line (or its override), what is
    allowed and the nearest valid name. The objective's own fields are checked by `build_objective`.
    """
    path = find_recipe(recipe)
    data, origin = read_recipe(path, overrides, defaults={"objective": dict(DEFAULT_OBJECTIVE)})
    loaded = validated(Recipe, data, origin)
    parts = loaded.objective if isinstance(loaded.objective, list) else [loaded.objective]
    for keys, part in zip(_part_keys(loaded.objective), parts):
        check_part(part, origin, keys)
    _check_across_fields(loaded, origin)
    loaded = loaded.model_copy(update={"output_dir": _output_dir(loaded.output_dir, path, origin)})
    loaded._origin = origin
    return loaded


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package (installed: `alignkit/configs`;
    checkout: `configs`).
    """
    here = Path(__file__).resolve().parents[1]
    folder = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
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
    raise ConfigError(
        f"there is no recipe `{recipe}`.{nearest(str(recipe), shipped)} Shipped: {', '.join(shipped)}"
    )


def dump_recipe(recipe: Recipe) -> str:
    """YAML of every field; reading it gives the same recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(mode="json")))


def build_objective(
    section: Section | list[Section],
    origin: Origin | None = None,
    *,
    safe: bool = False,
    keys: Keys = ("objective",),
) -> "Objective":
    """The objective of a recipe's section; a list gives the weighted sum. Imports torch, loads no
    model. `keys` lead to the section in the recipe.

    ConfigError for an unknown name or field or a value that the objective refuses, and for
    `import:` when `safe`.
    """
    from alignkit.objectives.base import Weighted

    origin = origin or Origin()
    if isinstance(section, dict):
        return _build_part(section, origin, keys, safe)
    parts = []
    for keys, part in zip(_part_keys(section), section):
        weight = validated(
            Weight, {"weight": part["weight"]} if "weight" in part else {}, origin, keys
        ).weight
        rest = {name: value for name, value in part.items() if name != "weight"}
        parts.append((_build_part(rest, origin, keys, safe), weight))
    weighted = Weighted(parts=parts)
    weighted.plan  # noqa: B018  parts that do not fit together are refused here
    return weighted


def _build_part(part: Section, origin: Origin, keys: Keys, safe: bool) -> "Objective":
    from alignkit.objectives.base import Objective

    check_part(part, origin, keys)
    if "import" in part:
        what = f"{origin.at((*keys, 'import'))}: {'.'.join(keys)}.import"
        cls = load_object(part["import"], what=what, safe=safe)
        if not (isinstance(cls, type) and issubclass(cls, Objective)):
            raise ConfigError(
                f"{what}: {part['import']} is not a subclass of alignkit.objectives.base.Objective"
            )
    else:
        module, name, _ = locate(part["name"])
        cls = getattr(import_module(module), name)
    return validated(
        cls, {k: v for k, v in part.items() if k not in ("name", "import")}, origin, keys
    )


def _part_keys(section: Section | list[Section]) -> list[Keys]:
    return (
        [("objective",)]
        if isinstance(section, dict)
        else [("objective", str(i)) for i in range(len(section))]
    )


def check_part(part: Section, origin: Origin, keys: Keys) -> None:
    """One part of an objective section says what it is by exactly one of `name` (registered) and
    `import`.
    """
    where = ".".join(keys)
    at = origin.at((*keys, "name"))
    given = [key for key in ("name", "import") if key in part]
    if len(given) != 1:
        raise ConfigError(
            f"{at}: `{where}` should have one of `name` and `import`; it has {' and '.join(given) or 'neither'}"
        )
    value = part[given[0]]
    if not isinstance(value, str):
        raise ConfigError(f"{at}: `{where}.{given[0]}` is {value!r}; it should be text")
    if given == ["name"] and value not in OBJECTIVES:
        raise ConfigError(
            f"{at}: there is no objective `{value}`.{nearest(value, OBJECTIVES)} Allowed: {', '.join(OBJECTIVES)}"
        )


def _check_across_fields(recipe: Recipe, origin: Origin) -> None:
    if recipe.train.steps is None and recipe.train.epochs is None:
        raise ConfigError(
            f"{origin.at(('train', 'steps'))}: `train.steps` and `train.epochs` are both null; give one"
        )
    kind = recipe.reference.kind
    hint = nearest(kind, REFERENCES)
    if kind not in REFERENCES and hint and not Path(kind).expanduser().exists():
        raise ConfigError(
            f"{origin.at(('reference', 'kind'))}: `reference.kind` is `{kind}`, neither a kind nor a path.{hint}"
        )


def _output_dir(given: str, recipe: Path, origin: Origin) -> str:
    """The run folder with `{recipe}` filled in. A recipe file may not climb out of the working
    directory with `..`; an override, typed by the user, may go anywhere and becomes absolute, so
    that the resolved recipe can be read again.
    """
    if recipe.stem.startswith("."):
        raise ConfigError(
            f"{recipe}: a recipe's name is the name of its run folder and cannot start with a dot"
        )
    folder = Path(given.replace("{recipe}", recipe.stem)).expanduser()
    if ".." not in folder.parts:
        return str(folder)
    place = origin.at(("output_dir",))
    if not place.startswith("override ") and not folder.resolve().is_relative_to(Path.cwd()):
        raise ConfigError(
            f"{place}: `output_dir` is {given}, outside {Path.cwd()}; use an absolute path or an override"
        )
    return str(folder.resolve())
