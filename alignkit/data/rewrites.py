"""Pairs as demonstrations of how to rewrite an answer: what a sequence-to-sequence reward model learns
(Zhou et al. 2024, arXiv:2409.00162).
"""

from collections.abc import Iterator
from dataclasses import replace

from alignkit.data.examples import make_example
from alignkit.data.file_formats import Row
from alignkit.data.messages import Text
from alignkit.data.read import Rows, Stream
from alignkit.data.verdicts import BadRow
from alignkit.errors import ConfigError, DataError


def asked_to_rewrite(prompt: Text, answer: Text, ask: str) -> Text:
    """The prompt that `ask`s for a better answer than the one it holds: in a chat as the user's next
    turn, in plain text behind the answer.
    """
    if isinstance(prompt, str) and isinstance(answer, str):
        return prompt + answer + ask
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answered = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    return [*turns, *answered, {"role": "user", "content": ask}]


def rewrites(rows: Rows, ask: str, family: str | None) -> Rows:
    """Each pair as two demonstrations: asked for a better answer than the rejected one, and than the
    chosen one, the chosen one is written. Rows are numbered anew, and `place` names row and answer.

    ConfigError for objectives that do not learn from demonstrations, DataError without pairs.
    """
    if family not in ("sequence", None):
        raise ConfigError(
            f"data.rewrite: it is for objectives that learn from demonstrations (sft), and this one "
            f"learns from {family} data; leave it out"
        )
    if not {"chosen", "rejected"} <= set(rows.columns):
        raise DataError(
            f"{rows.where}: data.rewrite needs preference pairs, columns prompt, chosen and rejected; "
            f"the columns are {', '.join(rows.columns)}"
        )
    format = "pair" if "prompt" in rows.columns else "implicit_pair"

    def every() -> Iterator[Row]:
        number = 0
        for row in rows.rows:
            for made in _both(row, rows.name, format, ask):
                number += 1
                yield replace(made, number=number)

    in_memory = isinstance(rows.rows, list)
    return replace(rows, rows=list(every()) if in_memory else Stream(every))


def _both(row: Row, name: str, format: str, ask: str) -> Iterator[Row]:
    place = row.place or f"{name}:{row.number}"
    # The system text stays a column of its own: it is put before the prompt later.
    values = dict(row.values or {})
    system = {"system": values.pop("system")} if "system" in values else {}
    try:
        pair = make_example(
            row if row.values is None else replace(row, values=values), format, "pair", name
        )
        if pair.prompt is None:
            raise BadRow(
                "missing", "the prompt is not told apart from the answers; give a column prompt"
            )
    except BadRow as bad:
        yield replace(row, values=None, problem=bad.detail, verdict=bad.verdict, place=place)
        return

    chosen, rejected = pair.completions
    others = {key: value for key, value in pair.columns.items() if key not in ("label", "margin")}
    for kind, answer in (("rejected", rejected), ("chosen", chosen)):
        prompt = asked_to_rewrite(pair.prompt, answer, ask)
        made = {**others, **system, "prompt": prompt, "completion": chosen}
        yield Row(row.number, made, place=f"{place} {kind}")
