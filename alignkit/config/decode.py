"""The `decode` section: a run that needs no training. Imports pydantic alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from alignkit.config.rewards import RewardConfig
from alignkit.config.section import Section
from alignkit.config.text import Origin, read_recipe
from alignkit.config.validation import validated
from alignkit.errors import ConfigError

# What shapes the law of methods that draw token by token.
SHAPE = ("temperature", "top_p", "cost", "order", "surprise")

# Method -> the fields that it needs, and those that it may have beside them.
USED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sample": ((), SHAPE),
    "best_of": (("n",), ("rewards",)),
    "soft_best_of": (("n", "beta"), ("rewards",)),
    "smc": (
        ("particles", "beta"),
        ("every", "ess", "twist", "twist_beta", "proposal", "fresh", "rewards"),
    ),
    "reject": (("beta", "bound"), ("tries", "rewards")),
    "fuse": (("weights",), SHAPE),
    "guide": (("value", "beta"), SHAPE),
}
ALWAYS = {"model", "method", "max_new_tokens"}

Method = Literal["sample", "best_of", "soft_best_of", "smc", "reject", "fuse", "guide"]
Share = Annotated[float, Field(ge=0, le=1)]


class DecodeConfig(Section):
    """How completions are drawn from finished models. The target of the methods with a `beta` is
    the tilted law p(y) e^(r(y) / beta) / Z of the model's law p and the reward r.
    """

    model: str = Field(
        "task",
        description="a run folder, a model folder, a hub name or task:NAME; task: the embedded task's",
    )
    method: Method = Field(
        description="sample: from the model · best_of, soft_best_of: n candidates, the best or one "
        "by its weight e^(r / beta) · smc: particles · reject: quasi rejection · fuse: several "
        "models token by token · guide: by a learned value"
    )
    beta: PositiveFloat | None = Field(None, description="strength of the tilt")
    n: PositiveInt | None = Field(None, description="best_of, soft_best_of: candidates")
    particles: PositiveInt | None = Field(None, description="smc: particles")
    every: PositiveInt = Field(8, description="smc: tokens between two chances to resample")
    ess: Share = Field(0.5, description="smc: resample below this share of effective particles")
    twist: str = Field(
        "none",
        description="smc: what guesses at the reward to come: none, reward (of the text so far), or "
        "the folder of a learned value (objective token_value)",
    )
    twist_beta: PositiveFloat | None = Field(
        None, description="smc: what the reward of the text so far is divided by; null: beta"
    )
    proposal: Literal["auto", "base", "twist"] = Field(
        "auto",
        description="smc: what particles grow by: the model, or the model times a learned value; "
        "auto: twist where the twist is a learned value",
    )
    fresh: NonNegativeInt = Field(
        8, description="smc: conditional runs for each completion, from which its KL is estimated"
    )
    bound: PositiveFloat | None = Field(
        None,
        description="reject: a completion is accepted with probability min(1, e^(r / beta) / bound)",
    )
    tries: PositiveInt = Field(
        256, description="reject: most samples for one completion; beyond, the decoder stops"
    )
    weights: dict[str, float] = Field(
        {},
        description="fuse: weight of each model's log-probs, by `policy` (the model), `reference` or "
        "what names a model; any sign, any sum",
    )
    value: str | None = Field(None, description="guide: the folder of a learned value")
    temperature: PositiveFloat = Field(1.0, description="sample, fuse, guide: divides the logits")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="sample, fuse, guide: probability mass of nucleus sampling"
    )
    cost: NonNegativeFloat = Field(
        0.0,
        description="sample, fuse, guide: the sparse law nearest to the model's at this price for each "
        "token that it keeps (Bregman top-k); 0: all tokens",
    )
    order: Literal[1, 2] = Field(
        1, description="with cost: nearest by the KL (1) or by half the squared distance (2)"
    )
    surprise: PositiveFloat | None = Field(
        None,
        description="sample, fuse, guide: nats per token that the cut steers towards (Mirostat)",
    )
    max_new_tokens: PositiveInt | None = Field(
        None, description="most tokens of a completion; null: as for the other models"
    )
    rewards: list[RewardConfig] = Field(
        [], description="what the decoder goes by; default: the score that is measured"
    )

    @model_validator(mode="after")
    def _fields_of_the_method(self) -> "DecodeConfig":
        needed, optional = USED[self.method]
        for name in needed:
            if not getattr(self, name):
                raise ValueError(f"method {self.method} needs `{name}`")

        given = self.model_fields_set - ALWAYS - {*needed, *optional}
        changed = [
            name
            for name in sorted(given)
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if changed:
            allowed = ", ".join((*needed, *optional))
            raise ValueError(
                f"method {self.method} does not use `{changed[0]}`; its fields: {allowed}"
            )
        return self

    @model_validator(mode="after")
    def _twist(self) -> "DecodeConfig":
        learned = self.learned_twist is not None
        if self.proposal == "twist" and not learned:
            raise ValueError(
                f"proposal twist needs a learned value, and the twist is `{self.twist}`; name its "
                "folder, or take proposal: base"
            )
        if self.twist_beta is not None and self.twist != "reward":
            raise ValueError(f"twist_beta goes with twist: reward; the twist is `{self.twist}`")
        return self

    @property
    def learned_twist(self) -> str | None:
        """The folder of the learned value that is the twist; None for any other twist."""
        return None if self.twist in ("none", "reward") else self.twist

    @property
    def asks_reward(self) -> bool:
        """Whether the decoder needs a reward."""
        return "rewards" in USED[self.method][1]


class DecodeFile(Section):
    """A YAML file that stands where a run folder stands."""

    decode: DecodeConfig


def is_decode_file(name: str) -> bool:
    """Whether the name of a model is that of a YAML file."""
    return Path(name).suffix in (".yaml", ".yml")


def load_decode(file: str | Path) -> DecodeConfig:
    """The `decode` section of a YAML file. ConfigError for any other content, with its place."""
    path = Path(file).expanduser()
    data, origin = read_recipe(path)
    if "decode" not in data:
        raise ConfigError(
            f"{path}: a file in the place of a run has a `decode` section, such as "
            "`decode: {method: soft_best_of, n: 8, beta: 0.1}`"
        )
    return parsed_decode(data, origin)


def parsed_decode(data: Mapping[str, Any], origin: Origin | None = None) -> DecodeConfig:
    """The section of plain data `{decode: {...}}`. ConfigError names the place of a fault."""
    return validated(DecodeFile, data, origin or Origin()).decode
