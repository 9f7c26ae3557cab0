"""What samplers exchange with the rest: the `Sampler` protocol, its `Sample`, and the factory of the recipe's engine."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from alignkit.batches import Draw
from alignkit.errors import ConfigError
from alignkit.rollout.config import RolloutConfig


@dataclass(frozen=True)
class Sample:
    """One completion, on the CPU. `logps` describe the distribution that the tokens were drawn from: temperature, nucleus
    and mixture included."""

    ids: Tensor  # [T] int64, with the end token when there is one
    logps: Tensor  # [T] float32, natural log
    ended: bool  # an end token was sampled; False: cut at the cap


class Sampler(Protocol):
    """Draws completions; the noise depends on (seed, step, prompt id, completion, position) alone."""

    def sample(self, prompts: Sequence[Tensor], draw: Draw, *, step: int, prompt_ids: Sequence[int]) -> list[list[Sample]]:
        """`draw.n` samples for each prompt ([P] int64 each). Two draws that must be independent (a completion and its
        opponent) need different steps: under one step and prompt id they see the same noise."""
        ...


class Models(Protocol):
    """Where a sampler finds its models: a `PolicyPair`, or `OneModel`."""

    tokenizer: Any

    def model(self, name: str) -> AbstractContextManager[nn.Module]:
        """The causal language model called `name` ("policy", "reference", "target"), in eval mode inside the context."""
        ...


def make_sampler(config: RolloutConfig, models: Models, *, seed: int, exact: bool = True) -> Sampler:
    """The engine that the recipe's `rollout` section asks for.

    `exact` (the caller trains on the log-probs) refuses what the trainer's log-probs do not describe: a temperature other
    than 1, and top_p below 1, under which tokens outside the nucleus have no importance weight at all. Raises ConfigError.
    """
    from alignkit.rollout.hf import HFSampler

    if config.engine == "vllm" or config.url is not None:
        raise ConfigError("rollout.engine: vllm (and rollout.url) is not in this version; allowed: auto, hf")
    for name in ("temperature", "top_p"):
        if exact and getattr(config, name) != 1:
            raise ConfigError(
                f"rollout.{name}: {getattr(config, name)} samples from another distribution than the one that the policy's "
                "log-probs describe; training needs 1.0"
            )
    return HFSampler(models, max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p, seed=seed)
