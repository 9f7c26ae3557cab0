"""Solutions whose steps are labelled one by one, as rows of labelled completions."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from alignkit.data.file_formats import Row
from alignkit.data.read import Rows, Stream

COLUMNS = {"prompt", "completions", "labels"}  # what TRL calls stepwise supervision


def stepwise(rows: Rows, separator: str) -> Rows:
    """Each step of each row as a row of its own: the prompt with the steps before it, the step, and
    its label; `separator` ends every step. Rows are numbered anew, and `place` names row and step.
    """

    def every() -> Iterator[Row]:
        number = 0
        for row in rows.rows:
            for step in _steps(row, rows.name, separator):
                number += 1
                yield replace(step, number=number)

    in_memory = isinstance(rows.rows, list)
    return replace(rows, rows=list(every()) if in_memory else Stream(every))


def _steps(row: Row, name: str, separator: str) -> Iterator[Row]:
    values: Mapping[str, Any] = row.values or {}
    problem = row.problem if row.values is None else _problem(values)
    if problem:
        yield replace(row, values=None, problem=f"row {row.number}: {problem}")
        return

    prompt = values["prompt"]
    others = {key: value for key, value in values.items() if key not in COLUMNS}
    for number, (step, label) in enumerate(zip(values["completions"], values["labels"]), 1):
        completion = f"{step}{separator}"
        place = f"{row.place or f'{name}:{row.number}'} step {number}"
        yield Row(
            row.number, {**others, "prompt": prompt, "completion": completion, "label": label},
            place=place,
        )  # fmt: skip
        prompt += completion


def _problem(values: Mapping[str, Any]) -> str:
    """What is wrong with a row's columns; empty where nothing is."""
    steps = values.get("completions")
    labels = values.get("labels")
    if not isinstance(values.get("prompt"), str):
        return "prompt is no text; steps go with a prompt that is one"
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
        return "completions is no list of texts, one for each step"
    if not isinstance(labels, list) or len(labels) != len(steps):
        given = len(labels) if isinstance(labels, list) else "no"
        return f"{len(steps)} completions and {given} labels; there is one for each step"
    return ""
