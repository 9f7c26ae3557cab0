"""Loading a reward or preference model to train: a language model's backbone under a fresh head."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging as transformers_logging

from alignkit.batches import Plan
from alignkit.config.model import ModelConfig
from alignkit.errors import ConfigError
from alignkit.policies.export import dtype_to_save
from alignkit.policies.load import load_model
from alignkit.policies.scorer import TrainedScorer
from alignkit.policies.tokenizer import check_vocabulary, load_tokenizer


def load_scorer(
    model: ModelConfig,
    plan: Plan,
    *,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
) -> TrainedScorer:
    """A model of `plan.outputs` numbers per text, ready to train: a language model's backbone and a
    fresh head, initialised from `seed`.

    What the numbers mean is written into the config that is saved. Raises ModelError, and
    ConfigError for LoRA.
    """
    if model.adapter is not None:
        raise ConfigError(
            "model.adapter: reward and preference models are trained whole; leave the adapter out"
        )
    tokenizer = load_tokenizer(model)
    torch.manual_seed(seed)
    with quiet_loading():
        loaded, dropout = load_model(model, device=device, dtype=dtype, outputs=plan.outputs)
    check_vocabulary(loaded, tokenizer, model.name_or_path)
    if model.gradient_checkpointing:
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # The classifier finds the last token of a text by the pad token.
    loaded.config.pad_token_id = tokenizer.pad_token_id
    loaded.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if plan.joined:
        loaded.config.alignkit_outputs = "joined"
    else:
        loaded.config.alignkit_outputs = "reward" if plan.outputs == 1 else "embedding"
    return TrainedScorer(loaded, tokenizer, save_config=dropout, save_dtype=dtype_to_save(model))


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' warning that a head is new and another unused, which is intended."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
