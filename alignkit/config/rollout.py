"""The recipe's `rollout` section. Imports pydantic alone."""

from contextlib import suppress
from ipaddress import ip_address
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

MAX_NEW_TOKENS = 64  # of a completion, where nobody says otherwise


class RolloutConfig(BaseModel):
    """How online objectives sample completions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True
    )
    url: str | None = Field(
        None, description="the sampling server: http on a loopback address, https elsewhere"
    )
    engine: Literal["auto", "hf", "vllm"] = Field(
        "auto", description="who samples; auto: vllm where there is a url, else hf"
    )
    completions: Annotated[int, Field(ge=2)] = Field(8, description="completions per prompt")
    max_new_tokens: PositiveInt = Field(MAX_NEW_TOKENS, description="cap on tokens per completion")
    temperature: PositiveFloat = Field(
        1.0, description="of the run's samples; training needs 1, which its log-probs describe"
    )
    pass_rate: tuple[float, float] | None = Field(
        None,
        description="learn from prompts whose mean score is strictly between these; null = from all",
    )
    refills: NonNegativeInt = Field(
        3, description="pass_rate: further batches of prompts tried until a step has enough"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="nucleus mass of the run's samples; training needs 1"
    )
    start_timeout: PositiveFloat = Field(
        600.0, description="vllm: seconds that the server may take to load its model"
    )
    timeout: PositiveFloat = Field(
        600.0,
        description="vllm: seconds without a sign of life from the server until the run stops",
    )
    max_importance: Annotated[float, Field(ge=1)] = Field(
        2.0, description="vllm: cap on a completion's weight, trainer over server"
    )
    max_mismatch: PositiveFloat = Field(
        0.1,
        description="vllm: the run stops above this KL(server || trainer), nats per token: these are other weights",
    )

    @field_validator("url")
    @classmethod
    def _allowed_address(cls, url: str | None) -> str | None:
        """Weights and completions cross this machine in the clear, others under TLS."""
        if url is None:
            return url
        parts = urlsplit(url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.path.rstrip("/")
            or "@" in parts.netloc
        ):
            raise ValueError(
                "write http://127.0.0.1:PORT, or https://HOST:PORT for a server elsewhere"
            )
        parts.port  # noqa: B018  raises where it is no number
        loopback = parts.hostname == "localhost"
        with suppress(ValueError):
            loopback = ip_address(parts.hostname).is_loopback
        if parts.scheme == "http" and not loopback:
            raise ValueError(
                f"http would send weights to {parts.hostname} in the clear; use https, or a tunnel to 127.0.0.1"
            )
        return url

    @field_validator("engine")
    @classmethod
    def _engine_of_the_url(cls, engine: str, others: ValidationInfo) -> str:
        """`auto` depends on the url alone, so it is resolved here."""
        if "url" not in others.data:  # refused
            return engine
        url = others.data["url"]
        if engine == "vllm" and url is None:
            raise ValueError(
                "engine vllm needs a url: start `python -m alignkit.rollout.vllm_server MODEL --port 8001` in vLLM's environment "
                "and set rollout.url=http://127.0.0.1:8001"
            )
        if engine == "hf" and url is not None:
            raise ValueError("the url is a vLLM server's, and the engine is hf; set one of them")
        return "hf" if url is None else "vllm"

    @model_validator(mode="after")
    def _an_interval(self) -> "RolloutConfig":
        if self.pass_rate is not None and not self.pass_rate[0] < self.pass_rate[1]:
            raise ValueError(
                f"pass_rate goes from low to high, such as [0.1, 0.9]; got {list(self.pass_rate)}"
            )
        return self
