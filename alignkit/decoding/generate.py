"""Text in, text out, by a decoder: what `alignkit generate --toward` does."""

from alignkit.config.decode import DecodeConfig
from alignkit.config.rollout import MAX_NEW_TOKENS
from alignkit.data.prompts import Prompt as PromptRow
from alignkit.decoding.making import make_decoder
from alignkit.policies.module import context_length
from alignkit.rollout.generate import OneModel, Prompt, prompt_ids
from alignkit.rollout.text import decode_all


def generate_toward(
    models: OneModel,
    prompt: Prompt,
    config: DecodeConfig,
    *,
    completions: int = 1,
    max_new_tokens: int | None = None,
    seed: int = 0,
    safe: bool = False,
) -> list[str]:
    """`completions` texts for a prompt by the decoder that `config` describes, whose `rewards` it
    goes by; without special tokens.

    max_new_tokens is 64, or what the context leaves the prompt, unless given. Raises what
    `alignkit.decoding.making.make_decoder` and the decoder raise.
    """
    ids = prompt_ids(prompt, models.tokenizer)
    room = context_length(models.network) - len(ids)
    cap = max(1, min(MAX_NEW_TOKENS, room)) if max_new_tokens is None else max_new_tokens
    decoder = make_decoder(config, models, reward=None, max_new_tokens=cap, seed=seed, safe=safe)
    text = prompt if isinstance(prompt, str) else list(prompt)
    row = PromptRow(ids, text, "prompt", {})
    return decode_all(models.tokenizer, decoder.decode([row], completions).ids)[0]
