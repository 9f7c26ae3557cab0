"""Sampling with unmodified vLLM servers: the policy's weights go to all of them before each rollout,
and every answer names the weights that its tokens were drawn with.
"""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError
from torch import Tensor
from transformers import AutoConfig
from typing_extensions import TypedDict

from alignkit.batches import Draw
from alignkit.config.rollout import RolloutConfig
from alignkit.errors import ConfigError, ModelError, NumericsError, ResourceError
from alignkit.policies.weight_stream import WeightStream, write_weights
from alignkit.rollout.client import Client
from alignkit.rollout.fleet import Fleet, Stale
from alignkit.rollout.noise import row_keys
from alignkit.rollout.protocol import (
    Continuation,
    Models,
    Sample,
    check_request,
    stop_tokens,
)
from alignkit.rollout.transfer import Transfer
from alignkit.rollout.transfer_ways import way_of

log = logging.getLogger("alignkit")
SEEDS = (1 << 62) - 1  # vLLM takes 63 bits, and adds a completion's number to its prompt's seed
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BYTES_PER_TOKEN = 256  # of an answer: ids and log-probs in JSON
LOWEST = -9000.0  # what vLLM writes in place of a log-prob that is not finite is below
SHAPE = (  # of a model's config: what tells two architectures apart
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


class TokenLogp(TypedDict):
    """A sampled token and its log-prob."""

    token_id: NonNegativeInt
    logprob: float


class Logprobs(BaseModel):
    """The log-probs of a completion's tokens."""

    content: Annotated[list[TokenLogp], Field(min_length=1)]


class Span(BaseModel):
    """The weights that neighbouring tokens of a completion were drawn with."""

    version: str


class Completion(BaseModel):
    """One completion of an answer."""

    index: NonNegativeInt
    token_ids: Annotated[list[NonNegativeInt], Field(min_length=1)]
    logprobs: Logprobs
    finish_reason: str
    weight_versions: Annotated[list[Span], Field(min_length=1)]


class Answer(BaseModel):
    """What a server says to a request for the completions of one prompt."""

    choices: list[Completion]


@dataclass(frozen=True)
class Weights:
    """The policy's weights at one time, in a folder that is deleted with this object."""

    folder: "tempfile.TemporaryDirectory[str]"
    version: str


class VLLMSampler:
    """Draws from the policy alone; see `Sampler` for the contract. Each prompt has a seed of its
    own, a function of (seed, step, prompt id), to which vLLM adds the completion's number, so a run
    that is taken up again draws the same.

    pushes  whether this process gives its servers the weights: one process for each server
    sleeps  whether the servers free their GPU between rollouts
    """

    def __init__(
        self,
        models: Models,
        config: RolloutConfig,
        *,
        seed: int,
        pushes: bool = True,
        sleeps: bool = False,
    ):
        self.models = models
        self.config = config
        self.seed = seed
        self.pushes = pushes
        self.sleeps = sleeps
        self.fleet = Fleet(config.urls, timeout=config.timeout)
        self.about = self.fleet.wait(config.start_timeout)
        self._check_models()
        self.stop = stop_tokens(models)
        self.updates = 0  # how many weights this process has given
        self.version = ""  # nothing pushed yet
        self.asleep = False
        self.transfer = self._made_transfer()

    @property
    def max_length(self) -> int:
        """Tokens of prompt and completion that every server takes."""
        return min(int(about["max_model_len"]) for about in self.about)

    def sync(self) -> None:
        """Give the servers the policy's present weights; a process that does not push takes what is
        there when it draws.
        """
        self.version = ""
        if self.transfer is None:
            self.use(self.take())
            return
        self._wake()
        with self.models.model("policy") as model:
            stream = WeightStream(model, self.dtype)
            self.updates += self.pushes
            self.version = self.transfer.send(stream, self.updates)

    def take(self) -> "Weights | None":
        """The policy's present weights, written to a folder that the servers see; None in a process
        that does not push, which only takes part.
        """
        with self.models.model("policy") as model:
            stream = WeightStream(model, self.dtype)
            if self.pushes:
                return self._written(stream)
            stream.take_part()  # its shards are needed where the weights are pushed
            return None

    def _written(self, stream: WeightStream) -> "Weights":
        parent = self.config.weights_dir
        try:
            folder = tempfile.TemporaryDirectory(prefix="alignkit-weights-", dir=parent)
            digest = write_weights(stream, Path(folder.name))
        except OSError as error:
            raise ResourceError(
                f"cannot write weights to {parent or tempfile.gettempdir()}: {error.strerror}; set "
                "rollout.weights_dir or TMPDIR"
            ) from error
        self.updates += 1
        return Weights(folder, f"{self.updates}:{digest}")

    def use(self, weights: "Weights | None") -> None:
        """Give the servers weights that were taken, which are deleted when nobody holds them."""
        if weights is None or weights.version == self.version:
            return
        self._wake()
        self.version = weights.version
        folder = Path(weights.folder.name)
        self.fleet.on_all(lambda client: _give(client, folder, weights.version))

    def _made_transfer(self) -> Transfer | None:
        """How weights get to the servers without a file; None: by a file."""
        with self.models.model("policy") as model:
            device = next(model.parameters()).device
        way = way_of(self.config, self.about, device)
        if way is None:
            return None
        log.info("the servers get the weights by %s", type(way).__name__)
        return Transfer(self.fleet, way, pushes=self.pushes)

    def _wake(self) -> None:
        if self.asleep:
            self.fleet.on_all(Client.wake)
            self.asleep = False

    def rest(self) -> None:
        """Servers on the trainer's own GPUs free them until the next `sync`, which wakes them."""
        if self.pushes and self.sleeps:
            self.fleet.on_all(Client.sleep)
            self.asleep = True

    def sample(
        self,
        prompts: Sequence[Tensor],
        draw: Draw,
        *,
        step: int,
        prompt_ids: Sequence[int],
        continued: Sequence[Continuation] | None = None,
        keep: bool = False,  # the servers keep prefixes of their own accord
    ) -> list[list[Sample]]:
        """`draw.n` samples for each prompt; see `Sampler.sample`.

        Raises ConfigError, DataError, NumericsError, ResourceError.
        """
        n = check_request(prompts, draw, prompt_ids, continued)
        check_draw(draw)
        if not prompts:
            return []
        cap = self.config.max_new_tokens
        rooms = [cap] * len(prompts) if continued is None else [start.room for start in continued]
        self._check_room(prompts, rooms)
        self.version = self.version or self.fleet.version()

        ids = torch.tensor(prompt_ids)
        completions = positions = torch.zeros_like(ids)
        if continued is not None:
            completions = torch.tensor([start.completion for start in continued])
            positions = torch.tensor([start.position for start in continued])
        seeds = (row_keys(self.seed, step, ids, completions, positions) & SEEDS).tolist()
        requests = [
            self._request(prompt, n, key, room)
            for prompt, key, room in zip(prompts, seeds, rooms, strict=True)
        ]
        return self.fleet.map(self._answered, requests)

    def _check_room(self, prompts: Sequence[Tensor], rooms: Sequence[int]) -> None:
        for prompt, wanted in zip(prompts, rooms, strict=True):
            room = self.max_length - len(prompt)
            if room < wanted:
                raise ConfigError(
                    f"rollout.max_new_tokens: a prompt leaves room for {room} of {wanted} tokens "
                    f"in the server's {self.max_length}; lower it or data.max_length, or start the "
                    "server with a larger --max-model-len"
                )

    def _request(self, prompt: Tensor, n: int, seed: int, room: int) -> dict[str, Any]:
        """All completions of a prompt are one request: its tokens are computed once."""
        return {
            "token_ids": prompt.tolist(),
            "sampling_params": {
                "n": n,
                "seed": seed,
                "max_tokens": room,
                "temperature": self.config.temperature,
                "top_p": self.config.top_p,
                "stop_token_ids": self.stop,
                "ignore_eos": True,  # the trainer says what ends a completion
                "logprobs": 0,  # of the sampled token alone
                "detokenize": False,
            },
        }

    def _answered(self, client: Client, asked: Mapping[str, Any]) -> list[Sample]:
        """The samples of one prompt, with every number in them checked: the trainer learns from
        them.
        """
        n = asked["sampling_params"]["n"]
        most = (1 << 16) + n * (256 + BYTES_PER_TOKEN * self.config.max_new_tokens)
        try:
            answer = Answer.model_validate_json(client.generate(asked, most))
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, fault["loc"]))
            raise ResourceError(
                f"rollout.url: {client.url} gave a malformed answer at {place}: {fault['msg']}"
            ) from None

        rows = sorted(answer.choices, key=lambda row: row.index)
        vocabulary = self.vocabulary
        cap = self.config.max_new_tokens
        if [row.index for row in rows] != list(range(n)) or any(
            len(row.token_ids) > cap or max(row.token_ids) >= vocabulary for row in rows
        ):
            raise ResourceError(
                f"rollout.url: {client.url} did not give the {n} completions that were asked for, "
                f"of at most {cap} tokens below {vocabulary} each"
            )
        return [self._sample(client, row) for row in rows]

    def _sample(self, client: Client, row: Completion) -> Sample:
        versions = {span.version for span in row.weight_versions}
        if self.version not in versions:
            raise Stale(
                f"rollout.url: stale weights: the server at {client.url} has others than this run "
                f"gave it ({min(versions)[:24]}, not {self.version[:24]}); it was started again, or "
                "another run uses it. Give each run its own servers, then go on with --resume auto"
            )

        pairs = row.logprobs.content
        if [pair["token_id"] for pair in pairs] != row.token_ids:
            raise ResourceError(
                f"rollout.url: {client.url} gave a malformed answer: its log-probs are not those of "
                "its tokens"
            )
        logps = [pair["logprob"] for pair in pairs]
        if not (min(logps) > LOWEST and max(logps) <= 1e-3):
            raise NumericsError(
                "sampling: the server's log-probs are not finite; the policy's weights hold nan "
                "or inf"
            )
        return Sample(
            torch.tensor(row.token_ids),
            torch.tensor(logps, dtype=torch.float32),
            row.finish_reason == "stop",
            mixed=len(versions) > 1,
        )

    def _check_models(self) -> None:
        """ModelError unless the servers' architecture is the policy's, as far as their configs can
        be read here; a server refuses weights of other shapes.
        """
        with self.models.model("policy") as model:
            config: Any = model.config
            own = _shape_of(config)
        self.vocabulary = own["vocab_size"]
        for url, about in zip(self.config.urls, self.about, strict=True):
            holds = f"rollout.url: the server at {url} holds {about.get('model')}"
            theirs = _shape_at(str(about.get("model")))
            wrong = [
                f"{name} {theirs[name]} for {value}"
                for name, value in own.items()
                if theirs and theirs[name] != value
            ]
            if wrong:
                raise ModelError(
                    f"{holds}, another architecture ({', '.join(wrong)}); start it with the model "
                    "that is trained"
                )

            about["dtype"] = str(about.get("dtype")).removeprefix("torch.")
            if about["dtype"] not in DTYPES:
                raise ModelError(f"{holds} in {about['dtype']}; allowed: {', '.join(DTYPES)}")
            if about["dtype"] != self.about[0]["dtype"]:
                raise ModelError(
                    f"{holds} in {about['dtype']}, and another server in {self.about[0]['dtype']}; "
                    "start all of them with the same --dtype"
                )
        self.dtype = DTYPES[self.about[0]["dtype"]]


def _shape_of(config: Any) -> dict[str, Any]:
    text = config.get_text_config()
    return {name: getattr(text, name, None) for name in SHAPE}


def _shape_at(name: str) -> dict[str, Any]:
    """The shape of a model by its folder or name; empty where its config is not on this machine."""
    try:
        return _shape_of(AutoConfig.from_pretrained(name, local_files_only=True))
    except Exception:  # loaders raise anything
        return {}


def _give(client: Client, folder: Path, version: str) -> None:
    """Load weights, unless the server has these already; it may have lost them since the last step."""
    _, _, digest = version.partition(":")
    if client.version().partition(":")[2] != digest:
        client.load(folder, version)
    elif client.version() != version:
        client.rename(version)


def check_draw(draw: Draw) -> None:
    """ConfigError for what a server that holds the policy alone cannot draw."""
    if len(draw.models) > 1:
        raise ConfigError(
            "rollout.engine: vllm cannot sample the token-level mixture of policy and reference "
            "that this objective asks for; use rollout.engine: hf"
        )
    source = next(iter(draw.models))
    if source != "policy":
        raise ConfigError(
            "rollout.engine: vllm holds the policy alone; this objective draws from its "
            f"`{source}`: use rollout.engine: hf"
        )
