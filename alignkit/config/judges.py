"""The recipe's `judge` section. Imports pydantic alone."""

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from alignkit.config.rewards import RewardConfig

STRICT = ConfigDict(
    extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
)
# environment variable that `--allow-private-judge` sets for all processes
ALLOW_PRIVATE = "ALIGNKIT_ALLOW_PRIVATE_JUDGE"
KINDS = ("function", "rewards", "model", "trl", "chat")


class ChatConfig(BaseModel):
    """A language model behind an OpenAI-compatible endpoint."""

    model_config = STRICT
    url: str = Field(
        description="base address, such as https://host/v1; http on a loopback address only"
    )
    model: str = Field(description="the endpoint's name of the model")
    api_key_env: str | None = Field(
        None,
        description="environment variable that holds the key; the key itself goes nowhere else",
    )
    criterion: str = Field(
        "Which answer is more helpful, correct and well written?", description="what better means"
    )
    timeout: PositiveFloat = Field(60.0, description="seconds for one request, all of it")
    retries: NonNegativeInt = Field(
        3, description="further attempts after a timeout, a lost connection, 429 or 5xx"
    )
    backoff: NonNegativeFloat = Field(
        0.5, description="seconds before the first of them, doubled each time, with jitter"
    )
    breaker: PositiveInt = Field(
        5, description="requests in a row that fail for good before the run stops"
    )
    concurrency: PositiveInt = Field(8, description="requests at a time")
    max_tokens: PositiveInt = Field(16, description="tokens of an answer")
    max_bytes: PositiveInt = Field(
        1 << 20, description="bytes of a response; a longer one is no verdict"
    )


class JudgeConfig(BaseModel):
    """A judge: exactly one of function, rewards, model, trl and chat."""

    model_config = STRICT
    function: str | None = Field(
        None,
        description="`module:name` or `file.py:name`: f(prompts, first, second) -> probabilities that the first wins",
    )
    rewards: list[RewardConfig] | None = Field(
        None, description="Bradley-Terry of this weighted sum of rewards"
    )
    model: str | None = Field(
        None, description="a folder or hub name that `reward_model` or `preference_model` trained"
    )
    trl: str | None = Field(
        None,
        description="`module:name` of an object or class with TRL's judge(prompts, completions, ...)",
    )
    chat: ChatConfig | None = Field(None, description="a language model behind an endpoint")
    temperature: NonNegativeFloat = Field(
        1.0, description="rewards: P = sigmoid(difference / temperature); 0: the higher wins"
    )
    both_orders: bool = Field(
        True, description="ask in both orders and average: no bias for a position can remain"
    )
    timeout: PositiveFloat = Field(
        600.0, description="seconds for one call of a function or TRL judge"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "JudgeConfig":
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a judge has exactly one of {', '.join(KINDS)}; this one has {' and '.join(given) or 'none'}"
            )
        return self
