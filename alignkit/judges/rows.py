"""A judge's verdicts on the completions of each prompt, as rows of their bundles."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

INVALID = (
    "every verdict of the judge in this step is invalid; check the judge's answers and its endpoint"
)
Texts = Sequence[Any]  # strings, or message lists for chats
Compare = Callable[[Texts, Texts, Texts], Any]  # (prompts, first, second) -> Verdict


def judged(
    judge: Compare, prompts: Texts, texts: Sequence[Texts], against: Sequence[Texts], *, table: bool
) -> list[dict[str, Tensor] | None]:
    """Rows of each prompt with K completions; None where one of its verdicts is invalid.

    With `table` every completion meets every other: "table" [K, K], and "preference" [K], its
    means. Else each meets the first of `against`, or the last of its own where none was drawn:
    "preference" [K].
    """
    if table:
        queries = [
            (i, row[j], row[k], (j, k))
            for i, row in enumerate(texts)
            for j in range(len(row))
            for k in range(j)
        ]
    else:
        queries = [
            (i, a, (against[i] or row[-1:])[0], (j, None))
            for i, row in enumerate(texts)
            for j, a in enumerate(row if against[i] else row[:-1])
        ]
    verdict = judge(
        [prompts[i] for i, *_ in queries], [q[1] for q in queries], [q[2] for q in queries]
    )
    rows = [torch.full((len(row), len(row)) if table else (len(row),), 0.5) for row in texts]
    valid = [True] * len(texts)
    for (i, _, _, (j, k)), p, ok in zip(
        queries, verdict.probability.tolist(), verdict.valid.tolist()
    ):
        valid[i] &= ok
        rows[i][(j, k) if table else j] = p
        if table:
            rows[i][k, j] = 1 - p
    found = [{"table": r, "preference": r.mean(-1)} if table else {"preference": r} for r in rows]
    return [own if ok else None for own, ok in zip(found, valid)]
