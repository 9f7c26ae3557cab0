"""The recipe's `judge` section. Imports pydantic alone."""

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

# environment variable that `--allow-private-judge` sets for all processes
ALLOW_PRIVATE = "ALIGNKIT_ALLOW_PRIVATE_JUDGE"
KINDS = ("function", "rewards", "model", "trl", "chat")


class ChatConfig(Section):
    """A language model behind an OpenAI-compatible endpoint."""

    url: str = Field(
        description="base address, such as https://host/v1; http on a loopback address only"
    )
    model: str = Field(description="the model's name at the endpoint")
    api_key_env: str | None = Field(
        None,
        description="environment variable that holds the key; the key is never written anywhere",
    )
    criterion: str = Field(
        "Which answer is more helpful, correct and well written?",
        description="the question that decides which is better",
    )
    timeout: PositiveFloat = Field(60.0, description="seconds that one request may take")
    retries: NonNegativeInt = Field(
        3, description="further attempts after a timeout, a lost connection, 429 or 5xx"
    )
    backoff: NonNegativeFloat = Field(
        0.5, description="seconds before the first retry, doubled each time, with jitter"
    )
    breaker: PositiveInt = Field(
        5, description="the run stops after this many failed requests in a row"
    )
    concurrency: PositiveInt = Field(8, description="requests at the same time")
    max_tokens: PositiveInt = Field(16, description="most tokens of an answer")
    max_bytes: PositiveInt = Field(
        1 << 20, description="most bytes of a response; a longer one is an invalid verdict"
    )


class JudgeConfig(Section):
    """A judge: exactly one of function, rewards, model, trl and chat."""

    function: str | None = Field(
        None,
        description="`module:name` or `file.py:name` of a function f(prompts, first, second) "
        "-> probabilities that the first wins",
    )
    rewards: list[RewardConfig] | None = Field(
        None, description="the Bradley-Terry preference of this weighted sum of rewards"
    )
    model: str | None = Field(
        None, description="a folder or hub name that `reward_model` or `preference_model` trained"
    )
    trl: str | None = Field(
        None,
        description="`module:name` of an object or class with TRL's method "
        "judge(prompts, completions, ...)",
    )
    chat: ChatConfig | None = Field(None, description="a language model behind an endpoint")
    temperature: NonNegativeFloat = Field(
        1.0, description="rewards: P = sigmoid(difference / temperature); 0: the higher reward wins"
    )
    both_orders: bool = Field(
        True, description="ask in both orders and average, so that no bias for a position remains"
    )
    timeout: PositiveFloat = Field(
        600.0, description="seconds that one call of a function or TRL judge may take"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "JudgeConfig":
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a judge has exactly one of {', '.join(KINDS)}; "
                f"this one has {' and '.join(given) or 'none'}"
            )
        return self
