"""New tokens, with embeddings for them."""

from typing import Any

import torch

from alignkit.errors import ConfigError


@torch.no_grad()
def add_tokens(model: Any, tokenizer: Any, tokens: list[str]) -> None:
    """Add `tokens` to the tokenizer, and rows for them to the model's embedding and head, which
    begin at the mean of the others (Hewitt 2021). ConfigError for tokens that it has already.
    """
    known = sorted(set(tokens) & set(tokenizer.get_vocab()))
    if known:
        raise ConfigError(
            f"model.add_tokens: the tokenizer has {', '.join(map(repr, known))} already; leave "
            "them out"
        )
    old = len(tokenizer)
    tokenizer.add_tokens(tokens)

    # Many embeddings are padded to more rows than the tokenizer has tokens.
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight[old : len(tokenizer)] = layer.weight[:old].float().mean(0).to(layer.weight)
