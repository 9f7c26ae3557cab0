"""Prompts of online objectives as token ids."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.config.data import DataConfig
from alignkit.data.chat import Renderer, chat_template
from alignkit.data.examples import BadRow, Example
from alignkit.data.report import Report
from alignkit.data.tokenise import Tokeniser


def tokenise_prompts(
    examples: Sequence[Example], config: DataConfig, tokenizer: Any, report: Report
) -> dict[int, Tensor]:
    """Row number -> ids [P]; prompts that leave no room for a completion are dropped and counted in
    `report`.
    """
    tokeniser = Tokeniser(tokenizer, config)
    ids = {}
    renderer = (
        Renderer(tokenizer, chat_template(config)) if any(made.chat for made in examples) else None
    )
    for chat in (False, True):
        texts: dict[int, str] = {}
        for made in examples:
            if made.chat != chat:
                continue
            try:
                texts[made.number] = _text(made, renderer)
            except BadRow as bad:
                report.add(bad.verdict, made.number, bad.detail)
        for number, encoded in zip(texts, tokeniser.encode(list(texts.values()), chat)):
            tokens = tokeniser.bos_once(encoded)
            report.prompt_lengths.append(len(tokens))
            report.lengths.append(len(tokens))
            if not tokens and tokeniser.stand_in is None:
                report.add("no_prompt", number)
            elif len(tokens) >= config.max_length:
                report.add("overlong", number, f"the prompt has {len(tokens)} tokens")
            else:
                if not tokens:
                    report.add(
                        "empty_prompt",
                        number,
                        "BOS (or EOS, for a tokenizer without BOS) stands in for it",
                    )
                ids[number] = torch.tensor(tokens or [tokeniser.stand_in])
    return ids


def _text(made: Example, renderer: Renderer | None) -> str:
    if renderer is None or not isinstance(made.prompt, list):
        return str(made.prompt)
    return renderer.text(made.prompt, dict(made.template), prompt=True)
