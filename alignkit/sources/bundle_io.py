"""Bundles from samples, with more channels, and as a few flat tensors and back: how a rollout buffer
goes into a checkpoint without pickle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Bundle
from alignkit.rollout.protocol import Sample


def pack(bundles: Sequence[Bundle]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Flat tensors and the JSON that `unpack` needs.

    All bundles must carry the same `rows` and `tokens` names.
    """
    if not bundles:
        return {}, {"uids": []}

    names = {"rows": sorted(bundles[0].rows), "tokens": sorted(bundles[0].tokens)}
    tensors = {
        "prompt": torch.cat([b.prompt for b in bundles]),
        "completions": torch.cat([ids for b in bundles for ids in b.completions]),
        "masks": torch.cat([mask for b in bundles for mask in b.masks]),
        **{f"rows.{n}": torch.cat([b.rows[n].flatten() for b in bundles]) for n in names["rows"]},
        **{
            f"tokens.{n}": torch.cat([row for b in bundles for row in b.tokens[n]])
            for n in names["tokens"]
        },
    }

    # How the flat tensors are cut again.
    shapes = {
        "uids": [b.uid for b in bundles],
        "prompts": [len(b.prompt) for b in bundles],
        "completions": [[len(ids) for ids in b.completions] for b in bundles],
        "rows": {n: [list(b.rows[n].shape) for b in bundles] for n in names["rows"]},
    }
    return tensors, shapes


def unpack(tensors: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> list[Bundle]:
    """The bundles that `pack` was given."""
    uids = shapes["uids"]
    if not uids:
        return []
    lengths = shapes["completions"]
    prompts = tensors["prompt"].split(shapes["prompts"])

    def nested(flat: Tensor) -> list[list[Tensor]]:
        pieces = iter(flat.split([n for row in lengths for n in row]))
        return [[next(pieces) for _ in row] for row in lengths]

    ids = nested(tensors["completions"])
    masks = nested(tensors["masks"])
    tokens = {k[7:]: nested(v) for k, v in tensors.items() if k.startswith("tokens.")}
    rows = {}
    for name, wanted in shapes["rows"].items():
        sizes = [int(torch.tensor(shape).prod()) for shape in wanted]
        rows[name] = [
            piece.reshape(shape)
            for piece, shape in zip(tensors[f"rows.{name}"].split(sizes), wanted)
        ]
    return [
        Bundle(
            prompts[i],
            ids[i],
            masks[i],
            uids[i],
            rows={n: rows[n][i] for n in rows},
            tokens={n: tokens[n][i] for n in tokens},
        )
        for i in range(len(uids))
    ]


def sampled_bundle(
    prompt: Any, samples: Sequence[Sample], rows: Mapping[str, Tensor], *, truncated: bool
) -> Bundle:
    """The samples of one prompt; every token of theirs is trained on, and those of samples without
    an end token if `truncated`.
    """
    return Bundle(
        prompt.ids,
        [sample.ids for sample in samples],
        [torch.full(sample.ids.shape, sample.ended or truncated) for sample in samples],
        prompt.uid,
        rows,
        tokens={"behavior": [sample.logps for sample in samples]},
    )


def joined(first: Bundle, second: Bundle) -> Bundle:
    """One bundle with the completions of two of the same prompt, behind one another."""
    return replace(
        first,
        completions=[*first.completions, *second.completions],
        masks=[*first.masks, *second.masks],
        rows={name: torch.cat([values, second.rows[name]]) for name, values in first.rows.items()},
        tokens={name: [*rows, *second.tokens[name]] for name, rows in first.tokens.items()},
    )


def with_channels(bundles: Sequence[Bundle], channels: Mapping[str, Tensor]) -> list[Bundle]:
    """The bundles with the rows of `channels` [N, T] in their tokens, cut to each completion's
    length. N counts the completions of all bundles.
    """
    extended = []
    row = 0
    for bundle in bundles:
        lengths = [len(ids) for ids in bundle.completions]
        tokens = {
            name: [values[row + k, :length].cpu() for k, length in enumerate(lengths)]
            for name, values in channels.items()
        }
        extended.append(replace(bundle, tokens={**bundle.tokens, **tokens}))
        row += len(lengths)
    return extended
