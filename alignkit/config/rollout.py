"""The recipe's `rollout` section. Imports pydantic alone."""

from contextlib import suppress
from ipaddress import ip_address
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from alignkit.config.allocation import AllocateConfig
from alignkit.config.section import Section

COLOCATED = "http://127.0.0.1:8001"  # where a server is started that has no url
MAX_NEW_TOKENS = 64  # the default cap on the tokens of a completion


class RolloutConfig(Section):
    """How online objectives sample completions."""

    url: str | Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="the vLLM server, or a list of servers: http on a loopback address, https elsewhere",
    )
    colocate: bool = Field(
        False,
        description="start and stop `vllm serve` at each url (default: http://127.0.0.1:8001); on "
        "GPUs they sleep while the policy trains",
    )
    program: Annotated[str, Field(min_length=1)] = Field(
        "vllm", description="colocate: the program to start, such as .venv-vllm/bin/vllm"
    )
    weights_dir: str | None = Field(
        None,
        description="vllm: a folder that trainer and servers see under one path, for the weights; "
        "null: this machine's folder for temporary files",
    )
    transfer: Literal["file", "nccl", "ipc"] | None = Field(
        None,
        description="vllm: how the weights get to the servers: nccl to GPUs of their own, ipc on the "
        "trainer's GPUs, or a file; null: what all servers were started for, else a file",
    )
    engine: Literal["auto", "hf", "vllm"] = Field(
        "auto", description="what samples; auto: vllm where there is a url, else hf"
    )
    ahead: NonNegativeInt = Field(
        0,
        description="rollouts that are sampled while earlier ones are trained on; importance weights "
        "account for how old they are",
    )
    completions: Annotated[int, Field(ge=2)] = Field(8, description="completions per prompt")
    allocate: AllocateConfig | None = Field(
        None,
        description="{pilot: 4}: prompts that are seldom answered well get more completions than "
        "others, `completions` on average; null: all alike",
    )
    max_new_tokens: PositiveInt = Field(MAX_NEW_TOKENS, description="most tokens per completion")
    temperature: PositiveFloat = Field(
        1.0,
        description="divides the logits of the policy and its anchors, in sampling, loss and KL alike",
    )
    mask_truncated: bool = Field(
        False,
        description="learn nothing from the tokens of completions that were cut at max_new_tokens; "
        "their scores still count in the group's baseline",
    )
    pass_rate: tuple[float, float] | None = Field(
        None,
        description="train only on prompts whose mean score lies strictly between these two; "
        "null: on all prompts",
    )
    refills: NonNegativeInt = Field(
        3, description="pass_rate: how many further batches of prompts are tried to fill a step"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="probability mass that nucleus sampling keeps; the KL stays that of the whole law",
    )
    top_k: NonNegativeInt = Field(
        0, description="sample from so many of the likeliest tokens; 0 = from all"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="sample from tokens at least so likely, relative to the likeliest; 0 = all"
    )
    stop: list[str] = Field(
        [], description="texts that end a completion, with the token that completes one of them"
    )
    environment: str | None = Field(
        None, description="a class of your own, file.py:Name, in whose world the policy takes turns"
    )
    tools: list[str] = Field(
        [], description="functions of your own, file.py:name, that the policy may call"
    )
    turns: PositiveInt = Field(8, description="environment, tools: most turns of an episode")
    rewritten: Literal["segments", "refuse"] = Field(
        "segments",
        description="environment, tools: what happens where a chat template rewrites earlier turns",
    )
    environment_timeout: PositiveFloat = Field(
        10.0, description="environment, tools: seconds for one answer; the episode then fails"
    )
    environment_memory_mb: PositiveInt = Field(
        4096, description="environment, tools: MiB of memory of one episode's process"
    )
    start_timeout: PositiveFloat = Field(
        600.0, description="vllm: seconds that the server may take to load its model"
    )
    timeout: PositiveFloat = Field(
        600.0,
        description="vllm: the run stops after this many seconds without an answer of the server",
    )
    max_importance: Annotated[float, Field(ge=1)] = Field(
        2.0,
        description="vllm or ahead: cap on a completion's importance weight (trainer over sampler)",
    )
    max_mismatch: PositiveFloat = Field(
        0.1,
        description="vllm: the run stops above this KL(server || trainer) in nats per token, "
        "because the server then holds other weights",
    )

    @property
    def urls(self) -> list[str]:
        """The servers' addresses."""
        if self.url is None:
            return [COLOCATED] if self.colocate else []
        return [self.url] if isinstance(self.url, str) else list(self.url)

    @field_validator("url")
    @classmethod
    def _allowed_addresses(cls, url: str | list[str] | None) -> str | list[str] | None:
        urls = url if isinstance(url, list) else [url]
        for one in urls:
            if one is not None:
                _check_address(one)
        if len(set(urls)) < len(urls):
            raise ValueError("a server is named twice")
        return url

    @model_validator(mode="after")
    def _engine_of_the_url(self) -> "RolloutConfig":
        """`auto` depends on the servers alone, so it is resolved here."""
        has_servers = bool(self.urls)
        if self.engine == "vllm" and not has_servers:
            raise ValueError(
                "engine vllm needs a url: start vLLM as docs/vllm.md says and set "
                "rollout.url=http://127.0.0.1:8001, or set rollout.colocate=true"
            )
        if self.engine == "hf" and has_servers:
            raise ValueError("the url is a vLLM server's, and the engine is hf; set one of them")
        if self.colocate and any(url.startswith("https:") for url in self.urls):
            raise ValueError("colocate starts servers on this machine; give http://127.0.0.1:PORT")
        if self.ahead and self.pass_rate is not None:
            raise ValueError(
                "pass_rate samples until enough prompts fit, so nothing can be sampled ahead; leave "
                "out one of ahead and pass_rate"
            )
        # Not by assignment, which would validate all over again.
        self.__dict__["engine"] = "vllm" if has_servers else "hf"
        return self

    @model_validator(mode="after")
    def _transfer_fits(self) -> "RolloutConfig":
        if self.transfer is None:
            return self
        if self.engine == "hf":
            raise ValueError(
                f"transfer {self.transfer} is a way to vLLM servers, and there is no url; leave it out"
            )
        if self.transfer == "file":
            return self

        # The others send tensors from a GPU, at once.
        if self.ahead:
            raise ValueError(
                f"transfer {self.transfer} sends the weights at once, and ahead keeps them until their "
                "rollout is drawn; leave out one of ahead and transfer"
            )
        if self.weights_dir is not None:
            raise ValueError(
                f"transfer {self.transfer} writes no file; leave out one of weights_dir and transfer"
            )

        if self.transfer == "nccl" and self.colocate:
            raise ValueError(
                "transfer nccl is for servers with GPUs of their own, and colocate starts them on the "
                "trainer's; use transfer: ipc"
            )
        if self.transfer == "ipc" and any(url.startswith("https:") for url in self.urls):
            raise ValueError(
                "transfer ipc is for servers on the trainer's own GPUs: give http://127.0.0.1:PORT, or "
                "use transfer: nccl"
            )
        return self

    @model_validator(mode="after")
    def _allocation_fits(self) -> "RolloutConfig":
        if self.allocate is None:
            return self
        if self.allocate.pilot >= self.completions:
            raise ValueError(
                f"allocate.pilot {self.allocate.pilot} leaves nothing of completions "
                f"{self.completions} to give away; lower it, or raise completions"
            )
        others = {
            "ahead": self.ahead,
            "pass_rate": self.pass_rate,
            "environment": self.environment,
            "tools": self.tools,
        }
        given = [name for name, value in others.items() if value]
        if given:
            raise ValueError(f"allocate and {', '.join(given)} cannot be combined; leave one out")
        return self

    @property
    def takes_turns(self) -> bool:
        """Whether completions are episodes with an environment or tools."""
        return self.environment is not None or bool(self.tools)

    @model_validator(mode="after")
    def _own_engine_alone(self) -> "RolloutConfig":
        """What only alignkit's own sampler can do."""
        given = {"top_k": self.top_k, "min_p": self.min_p, "stop": self.stop}
        unable = [name for name, value in given.items() if value]
        if self.engine == "vllm" and unable:
            raise ValueError(
                f"{', '.join(unable)}: not with vLLM servers; leave it out, or use engine: hf"
            )
        return self

    @property
    def truncation(self) -> list[str]:
        """What the sampler leaves out of each next-token law, as text: "top_p 0.9"."""
        whole = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        given = {name: getattr(self, name) for name in whole}
        return [f"{name} {value:g}" for name, value in given.items() if value != whole[name]]

    @model_validator(mode="after")
    def _pass_rate_is_an_interval(self) -> "RolloutConfig":
        if self.pass_rate is not None and not self.pass_rate[0] < self.pass_rate[1]:
            raise ValueError(
                f"pass_rate goes from low to high, such as [0.1, 0.9]; got {list(self.pass_rate)}"
            )
        return self


def _check_address(url: str) -> None:
    """http on this machine, https across a network: weights and completions are private."""
    parts = urlsplit(url)
    names_a_server = parts.scheme in ("http", "https") and parts.hostname
    if not names_a_server or parts.path.rstrip("/") or "@" in parts.netloc:
        raise ValueError("write http://127.0.0.1:PORT, or https://HOST:PORT for a server elsewhere")
    parts.port  # noqa: B018  raises ValueError where it is no number

    loopback = parts.hostname == "localhost"
    with suppress(ValueError):  # a host name is not an address
        loopback = ip_address(parts.hostname or "").is_loopback
    if parts.scheme == "http" and not loopback:
        raise ValueError(
            f"http would send weights to {parts.hostname} in the clear; "
            "use https, or a tunnel to 127.0.0.1"
        )
