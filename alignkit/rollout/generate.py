"""Text in, text out: what `alignkit generate` and the run's samples use."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn, tensor

from alignkit.batches import Draw
from alignkit.config.data import DataConfig
from alignkit.config.rollout import MAX_NEW_TOKENS
from alignkit.data.template import ChatTemplate
from alignkit.errors import ConfigError, DataError
from alignkit.policies.module import context_length
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.protocol import Models
from alignkit.rollout.text import decode_all

Prompt = str | Sequence[dict[str, Any]]  # plain text, or the messages of a chat


@dataclass(frozen=True)
class OneModel:
    """A loaded causal language model and its tokenizer, in the
    place of `Models`: every name means this model.
    """

    network: nn.Module
    tokenizer: Any

    @contextmanager
    def model(self, name: str = "policy") -> Iterator[nn.Module]:
        """The model in eval mode; its mode is put back afterwards."""
        training = self.network.training
        self.network.eval()
        yield self.network
        self.network.train(training)

    def together(self) -> AbstractContextManager[None]:
        """Nothing to agree on: this process holds the model whole."""
        return nullcontext()


def generate(
    models: Models,
    prompts: Sequence[Prompt],
    *,
    completions: int = 1,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    source: str = "policy",
) -> list[list[str]]:
    """`completions` texts for each prompt, without special tokens; a
    chat prompt goes through the tokenizer's template.

    max_new_tokens is 64, or what the context leaves the longest prompt, unless given. temperature 0
    takes the most likely token at each place. Prompt i sees the same noise in every call with the
    same seed, so two models, or one model before and after training, are compared on equal terms.
    Raises ConfigError for sampling arguments out of range and for prompts longer than the model's
    context, DataError for an empty prompt.
    """
    if completions < 1:
        raise ConfigError(f"generate: completions is {completions}; at least 1")
    ids = [prompt_ids(prompt, models.tokenizer) for prompt in prompts]
    with models.model(source) as model:
        room = context_length(model) - max(map(len, ids), default=0)
    cap = max(1, min(MAX_NEW_TOKENS, room)) if max_new_tokens is None else max_new_tokens
    sampler = HFSampler(models, max_new_tokens=cap, temperature=temperature, top_p=top_p, seed=seed)
    drawn = sampler.sample(ids, Draw(completions, source), step=0, prompt_ids=range(len(ids)))
    return decode_all(models.tokenizer, [[s.ids for s in samples] for samples in drawn])


def prompt_ids(prompt: Prompt, tokenizer: Any) -> Tensor:
    """Token ids [P] that a completion continues: a text without the end token that some tokenizers
    add, a chat with the header of the assistant's turn. ConfigError for a chat without a template,
    DataError where there is no token to start from.
    """
    ids = _text_ids(prompt, tokenizer) if isinstance(prompt, str) else _chat_ids(prompt, tokenizer)
    if not ids:
        raise DataError(
            "the prompt is empty and the tokenizer has neither a BOS nor an EOS token to start from"
        )
    return tensor(ids)


def _text_ids(prompt: str, tokenizer: Any) -> list[int]:
    ids = list(tokenizer(prompt)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    if ids:
        return ids

    # An empty prompt starts from the token that stands between texts.
    start_tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return [token for token in start_tokens if token is not None][:1]


def _chat_ids(messages: Sequence[dict[str, Any]], tokenizer: Any) -> list[int]:
    if not tokenizer.chat_template:
        raise ConfigError(
            "the prompt is a chat but the tokenizer has no chat template; give plain text"
        )
    return ChatTemplate(tokenizer, DataConfig()).ids(messages, prompt=True)
