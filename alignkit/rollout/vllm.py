"""Sampling with a vLLM server: the policy's weights are pushed before each rollout, and every
answer names its version.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator
from torch import Tensor

from alignkit.batches import Draw
from alignkit.config.rollout import RolloutConfig
from alignkit.errors import ConfigError, ModelError, NumericsError, ResourceError
from alignkit.files import vocabulary_hash
from alignkit.policies.export import write_weights
from alignkit.rollout.client import Client
from alignkit.rollout.noise import row_keys
from alignkit.rollout.protocol import Models, Sample, check_request, stop_tokens
from alignkit.rollout.wire import shape_of, version_of

SEEDS = (1 << 63) - 1  # vLLM takes 63 bits
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BYTES_PER_TOKEN = 64  # of an answer: an id and a log-prob in JSON


class Completion(BaseModel):
    """One completion of an answer."""

    model_config = ConfigDict(strict=True)
    ids: Annotated[list[NonNegativeInt], Field(min_length=1)]
    logps: list[float]
    ended: bool

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        if len(self.ids) != len(self.logps):
            raise ValueError("as many log-probs as tokens")
        return self


class Answer(BaseModel):
    """What the server says to a request for completions."""

    model_config = ConfigDict(strict=True)
    version: str
    completions: list[Completion]


class VLLMSampler:
    """Draws from the policy alone; see `Sampler` for the contract. Each completion has a seed of
    its own, a function of (seed, step, prompt id, completion), so a run that is taken up again
    draws the same.

    pushes  whether this process gives its server the weights: one process for each server
    """

    def __init__(self, models: Models, config: RolloutConfig, *, seed: int, pushes: bool = True):
        assert config.url is not None
        self.models = models
        self.config = config
        self.seed = seed
        self.pushes = pushes
        self.client = Client(config.url, timeout=config.timeout)
        self.about = self.client.wait(config.start_timeout)
        self._check_model()
        self.version = ""  # nothing pushed yet

    def sync(self) -> None:
        """Give the server the policy's present weights; a process that does not push takes what is
        there when it draws.
        """
        self.version = ""
        if self.pushes:
            with self.models.model("policy") as model:
                self._push(model)

    def sample(
        self, prompts: Sequence[Tensor], draw: Draw, *, step: int, prompt_ids: Sequence[int]
    ) -> list[list[Sample]]:
        """`draw.n` samples for each prompt; see `Sampler.sample`.

        Raises ConfigError, DataError, NumericsError, ResourceError.
        """
        n = check_request(prompts, draw, prompt_ids)
        check_draw(draw)
        if not prompts:
            return []
        self.version = self.version or self.client.hello()["version"]
        asked = self._request(prompts, n, step, prompt_ids)
        answer = self._answer(asked, n * len(prompts))
        samples = [self._sample(row) for row in answer.completions]
        return [samples[i : i + n] for i in range(0, len(samples), n)]

    def _request(
        self, prompts: Sequence[Tensor], n: int, step: int, prompt_ids: Sequence[int]
    ) -> dict[str, Any]:
        room = self.about["max_length"] - max(len(prompt) for prompt in prompts)
        if room < self.config.max_new_tokens:
            raise ConfigError(
                f"rollout.max_new_tokens: a prompt leaves room for {room} of "
                f"{self.config.max_new_tokens} tokens in the server's {self.about['max_length']}; "
                "lower it or data.max_length, or start the server with a larger --max-model-len"
            )

        ids = torch.tensor(prompt_ids).repeat_interleave(n)
        completions = torch.arange(n).repeat(len(prompts))
        keys = row_keys(self.seed, step, ids, completions, torch.zeros_like(ids)) & SEEDS

        return {
            "version": self.version,
            "max_new_tokens": self.config.max_new_tokens,
            "temperature": self.config.temperature,
            "top_p": self.config.top_p,
            "stop": stop_tokens(self.models),
            "prompts": [prompt.tolist() for prompt in prompts],
            "seeds": keys.view(-1, n).tolist(),
        }

    def _answer(self, asked: Mapping[str, Any], total: int) -> Answer:
        """The server's answer with every number in it checked: the trainer learns from them."""
        most = (1 << 16) + total * (128 + BYTES_PER_TOKEN * self.config.max_new_tokens)
        try:
            answer = Answer.model_validate(self.client.sample(asked, most))
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, fault["loc"]))
            raise ResourceError(
                f"rollout.url: {self.config.url} gave a malformed answer at {place}: {fault['msg']}"
            ) from None

        if answer.version != self.version:
            raise ResourceError(
                f"rollout.url: {self.config.url} sampled with stale weights: "
                f"{answer.version[:12]}, not {self.version[:12]}"
            )

        rows = answer.completions
        cap = asked["max_new_tokens"]
        vocabulary = self.about["shape"]["vocab_size"]
        if len(rows) != total or any(
            len(row.ids) > cap or max(row.ids) >= vocabulary for row in rows
        ):
            raise ResourceError(
                f"rollout.url: {self.config.url} did not give the {total} completions that were "
                f"asked for, of at most {cap} tokens below {vocabulary} each"
            )
        return answer

    def _sample(self, row: Completion) -> Sample:
        if not all(map(math.isfinite, row.logps)):
            raise NumericsError(
                "sampling: the server's log-probs are not finite; the policy's weights hold nan "
                "or inf"
            )
        return Sample(
            torch.tensor(row.ids), torch.tensor(row.logps, dtype=torch.float32), row.ended
        )

    def _push(self, model: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="alignkit-weights-") as folder:
            try:
                file = write_weights(model, Path(folder), dtype=DTYPES[self.about["dtype"]])
            except OSError as error:
                raise ResourceError(
                    f"cannot write weights to {folder}: {error.strerror}; set TMPDIR"
                ) from error
            self.version = version_of(file)

            # The server may have these weights already, or have lost them since the last step.
            if self.client.hello()["version"] != self.version:
                self.client.push(file, self.version)

    def _check_model(self) -> None:
        """ModelError unless the server's tokens and architecture are the policy's."""
        holds = f"rollout.url: the server at {self.config.url} holds {self.about.get('model')}"
        if self.about.get("vocabulary") != vocabulary_hash(self.models.tokenizer.get_vocab()):
            raise ModelError(
                f"{holds}, whose tokenizer is not the policy's; start it with the model that is "
                "trained"
            )

        with self.models.model("policy") as model:
            config: Any = model.config
            own = shape_of(config.get_text_config())
        theirs = self.about.get("shape") or {}
        wrong = [
            f"{name} {theirs.get(name)} for {value}"
            for name, value in own.items()
            if theirs.get(name) != value
        ]
        if wrong:
            raise ModelError(
                f"{holds}, another architecture ({', '.join(wrong)}); start it with the model "
                "that is trained"
            )

        if self.about.get("dtype") not in DTYPES or type(self.about.get("max_length")) is not int:
            raise ModelError(f"{holds} in {self.about.get('dtype')}; allowed: {', '.join(DTYPES)}")


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
