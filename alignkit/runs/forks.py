"""Answers that share a beginning: each answer forks once, so that a pair differs from there on."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alignkit.batches import Draw
from alignkit.rollout.protocol import Sample, Sampler


def forked(
    sampler: Sampler, prompts: Sequence[Tensor], trunks: Sequence[Sequence[Sample]], most: int
) -> list[list[Sample]]:
    """Each prompt's answers, at least two, each with another one behind it that shares its
    beginning; answers have at most `most` tokens.

    An answer forks at half the length of its neighbour among the prompt's answers. That place knows
    nothing of the answer itself, so that every leaf is a sample of the model: forking at half of its
    own length would prefer what comes of long answers. An answer that has ended there has no fork and
    stands behind itself.
    """
    lengths = [[len(trunk.ids) for trunk in row] for row in trunks]
    places = [[row[k - 1] // 2 for k in range(len(row))] for row in lengths]
    beginnings = [
        torch.cat([prompt, trunk.ids[:place]])
        for prompt, row, at in zip(prompts, trunks, places)
        for trunk, place in zip(row, at)
        if place < len(trunk.ids)
    ]
    drawn = iter(
        sampler.sample(beginnings, Draw(1), step=1, prompt_ids=range(len(beginnings)))
        if beginnings
        else ()
    )

    leaves: list[list[Sample]] = []
    for row, at in zip(trunks, places):
        leaves.append([])
        for trunk, place in zip(row, at):
            has_fork = place < len(trunk.ids)
            leaf = _joined(trunk, place, next(drawn)[0], most) if has_fork else trunk
            leaves[-1] += [trunk, leaf]
    return leaves


def _joined(trunk: Sample, place: int, rest: Sample, most: int) -> Sample:
    """The first `place` tokens of an answer and what was drawn behind them, cut at `most`."""
    ids = torch.cat([trunk.ids[:place], rest.ids])
    logps = torch.cat([trunk.logps[:place], rest.logps])
    return replace(rest, ids=ids[:most], logps=logps[:most], ended=rest.ended and len(ids) <= most)
