"""Tokenizers: loaded with a pad token, and compared with each other and with their model."""

from typing import Any

from transformers import AutoTokenizer

from alignkit import files
from alignkit.config.model import ModelConfig, check_source
from alignkit.errors import ModelError, first_line


def load_tokenizer(model: ModelConfig, field: str = "model.name_or_path") -> Any:
    """The model's tokenizer, with a pad token. `field` of the recipe names the model in errors.

    A tokenizer without one pads with its unknown or end token. That is harmless here, because masks
    come from lengths and never from ids. Raises ModelError.
    """
    check_source(model.name_or_path, field)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # tokenizers raise a bare Exception for a damaged file
        raise ModelError(
            f"{field}: no tokenizer could be loaded from {model.name_or_path}: {first_line(error)}"
        ) from error
    return padded(tokenizer, model.name_or_path, field)


def padded(tokenizer: Any, name: str, field: str = "model.name_or_path") -> Any:
    """The tokenizer, which is given a pad token where it has none. ModelError where it cannot be."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(
            f"{field}: the tokenizer of {name} has no pad, unknown or end "
            "token; add one (tokenizer.add_special_tokens({'pad_token': '<pad>'})) and save it "
            "beside the model"
        )
    return tokenizer


def same_vocabulary(first: Any, second: Any) -> bool:
    """Whether two tokenizers give every token the same id."""
    return vocabulary_hash(first) == vocabulary_hash(second)


def vocabulary_hash(tokenizer: Any) -> str:
    """Hash of a tokenizer's vocabulary, ids included."""
    return files.vocabulary_hash(tokenizer.get_vocab())


def check_vocabulary(
    model: Any, tokenizer: Any, name: str, field: str = "model.name_or_path"
) -> None:
    """ModelError unless every token of the tokenizer has a row in the model's embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ModelError(
            f"{field}: the tokenizer of {name} makes token ids up to {largest}, its "
            f"model has {rows} embeddings; use the tokenizer the model was trained with, or "
            "enlarge the model (resize_token_embeddings) and save both"
        )
