"""From checked examples to prompts, for objectives that sample their completions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.config.data import DataConfig
from alignkit.data.chat import leaves_out_others
from alignkit.data.encode import Ids, TextEncoder
from alignkit.data.examples import Example
from alignkit.data.messages import Text
from alignkit.data.report import Report
from alignkit.data.template import ChatTemplate
from alignkit.data.verdicts import BadRow
from alignkit.files import sha256_of_parts


@dataclass(frozen=True)
class Prompt:
    """One prompt of an online objective."""

    ids: Tensor  # [P] int64, at least one; a chat's end where the assistant begins to write
    text: Text  # as it stood in the data: what rewards and judges see
    uid: str
    columns: Mapping[str, Any]  # the row's other columns: a reward's keyword arguments


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the prompts with all that rewards and judges see of their rows, and of their
    order, for the checkpoint's manifest.
    """
    rows = ([p.ids.tolist(), p.text, dict(p.columns)] for p in prompts)
    return sha256_of_parts(
        json.dumps(row, sort_keys=True, default=_as_json).encode() for row in rows
    )


def _as_json(value: Any) -> Any:
    """JSON in place of a column's value that is none: an array, a date, bytes, an image."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat() if hasattr(value, "isoformat") else type(value).__name__


def tokenize_prompts(
    examples: Sequence[Example], config: DataConfig, tokenizer: Any, report: Report
) -> list[Prompt]:
    """The prompts of `examples` in their order. A prompt that leaves no room for a completion
    within `config.max_length` is dropped and counted in `report`.
    """
    encoder = TextEncoder(tokenizer, config)
    ids: dict[int, Ids] = {}  # by row number

    # Plain text and chats follow different rules for special tokens.
    for chat in (False, True):
        texts = _texts([e for e in examples if e.chat == chat], encoder, report)
        for number, encoded in zip(texts, encoder.encode(list(texts.values()), chat)):
            try:
                ids[number] = _checked_ids(encoded, number, encoder, report)
            except BadRow as bad:
                report.add_bad(bad, number)

    return [
        Prompt(torch.tensor(ids[e.number]), e.prompt or "", e.uid, e.columns)
        for e in examples
        if e.number in ids
    ]


def _texts(examples: Sequence[Example], encoder: TextEncoder, report: Report) -> dict[int, str]:
    """Row number -> the prompt as text, for examples that are all plain or all chats."""
    if not any(example.chat for example in examples):
        return {example.number: str(example.prompt) for example in examples}

    template = ChatTemplate(encoder.tokenizer, encoder.config)
    texts = {}
    for example in examples:
        assert isinstance(example.prompt, list), "a chat's prompt is messages"
        try:
            text = template.text(example.prompt, dict(example.template), prompt=True)
        except BadRow as bad:
            report.add_bad(bad, example.number)
            continue
        texts[example.number] = text
        if leaves_out_others(example.prompt, text):
            report.add("message_dropped", example.number)
    return texts


def _checked_ids(ids: Ids, number: int, encoder: TextEncoder, report: Report) -> Ids:
    """The ids of a prompt with BOS once and at least one token. Raises BadRow."""
    ids = encoder.without_second_bos(ids)
    report.prompt_lengths[len(ids)] += 1
    report.lengths[len(ids)] += 1

    if not ids and encoder.stand_in is None:
        raise BadRow("no_prompt")
    if encoder.config.truncate == "start" and len(ids) >= encoder.config.max_length:
        report.add("truncated", number)
        ids = ids[-(encoder.config.max_length - 1) :]
    if len(ids) >= encoder.config.max_length:
        raise BadRow("overlong", f"the prompt has {len(ids)} tokens")
    if not ids and encoder.stand_in is not None:
        detail = "BOS (or EOS, for a tokenizer without BOS) stands in for it"
        report.add("empty_prompt", number, detail)
        return [encoder.stand_in]
    return ids
