"""What the rest of alignkit knows of samplers: the `Sampler` protocol and its `Sample`. Engines are
made in `rollout.engines`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from alignkit.batches import Draw
from alignkit.errors import ConfigError, DataError


@dataclass(frozen=True)
class Sample:
    """One completion, on the CPU. `logps` describe the distribution that the tokens were drawn
    from: temperature, truncation and mixture included.
    """

    ids: Tensor  # [T] int64, with the end token when there is one
    logps: Tensor  # [T] float32, natural log
    ended: bool  # an end token was sampled; False: cut at the cap
    mixed: bool = False  # the weights were replaced between two of its tokens

    # Of the law that each token was drawn from, [T] each, where the sampler was asked to measure it.
    # The mean of summed `kl` over samples is the exact KL of whatever was sampled.
    kl: Tensor | None = None  # KL(law of the step || the reference's next-token law)
    entropy: Tensor | None = None  # of the law of the step
    reference_logps: Tensor | None = None  # log-prob of the token under the reference

    # What the engine has computed of prompt and completion, where it was asked to keep it for the
    # next turn; the engine alone knows what it is.
    cached: Any = None

    @property
    def own_tokens(self) -> int:
        """Tokens of the completion, all of which the policy has drawn."""
        return len(self.ids)


@dataclass(frozen=True)
class Continuation:
    """Where one sample takes up an episode that has begun, so that a later turn goes on with the
    noise of its own completion and stays within the episode's room.
    """

    completion: int  # its number among the completions of its prompt
    position: int  # tokens that the policy has drawn in the episode so far
    room: int  # most new tokens
    cached: Any = None  # of the last sample of this episode


class Sampler(Protocol):
    """Draws completions.

    The noise depends on (seed, step, prompt id, completion, position) and on nothing else.
    """

    def sample(
        self,
        prompts: Sequence[Tensor],
        draw: Draw,
        *,
        step: int,
        prompt_ids: Sequence[int],
        continued: Sequence[Continuation] | None = None,
        keep: bool = False,
    ) -> list[list[Sample]]:
        """`draw.n` samples for each prompt ([P] int64 each). Two draws that must be independent (a
        completion and its opponent) need different steps: under one step and prompt id they see the
        same noise.

        `continued` has one entry per prompt, each of which goes on with one episode (`draw.n` is
        1). Left out, all samples begin at position 0 with the engine's cap as their room. `keep`
        says that further turns follow, under the same weights. It changes the time and no sample.
        """
        ...

    def sync(self) -> None:
        """Draw from the policy as it is now, from here on. Called on every process before a
        rollout; the processes wait for each other afterwards.
        """
        ...

    def take(self) -> Any:
        """The policy's weights as they are now, for `use`; `sync` is both at once."""
        ...

    def use(self, weights: Any) -> None:
        """Draw with weights that were taken, from here on; the policy may have moved since. Called
        in the thread that samples.
        """
        ...

    def rest(self) -> None:
        """Nothing is drawn until the next `sync`: give up what the training step can use."""
        ...


class Models(Protocol):
    """Where a sampler finds its models: a `PolicyPair`, or `OneModel`."""

    @property
    def tokenizer(self) -> Any:
        """The models' one tokenizer."""
        ...

    def model(self, name: str) -> AbstractContextManager[nn.Module]:
        """The causal language model called `name` ("policy", "reference", "target"), in eval mode
        inside the context.
        """
        ...

    def together(self) -> AbstractContextManager[None]:
        """Entered by all processes around calls of models that are spread over them: inside, each
        process calls as often as it likes.
        """
        ...


def check_request(
    prompts: Sequence[Tensor],
    draw: Draw,
    prompt_ids: Sequence[int],
    continued: Sequence[Continuation] | None = None,
) -> int:
    """Completions per prompt of a request that can be answered. ConfigError, DataError."""
    if draw.n is None or draw.n < 1:
        raise ConfigError(f"sampling: {draw.n} completions per prompt; at least 1")
    if len(prompts) != len(prompt_ids):
        raise ConfigError(
            f"sampling: {len(prompts)} prompts but {len(prompt_ids)} prompt ids; "
            "give one id per prompt"
        )
    if continued is not None and (draw.n != 1 or len(continued) != len(prompts)):
        raise ConfigError(
            f"sampling: {draw.n} completions for each of {len(prompts)} prompts, which go on with "
            f"{len(continued)} episodes; ask for one completion of each"
        )
    if any(len(prompt) == 0 for prompt in prompts):
        raise DataError("sampling: a prompt has no tokens; give it at least one (a BOS token)")
    return draw.n


def stop_tokens(models: Models) -> list[int]:
    """The tokenizer's end token and those of the model's
    generation config (chat models have several).
    """
    with models.model("policy") as model:
        configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    tokens = {*several, models.tokenizer.eos_token_id}
    return sorted(token for token in tokens if token is not None)
