"""Control texts: labelled completions as demonstrations of what follows a good or a bad instruction."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from alignkit.config.data import ControlConfig
from alignkit.data.examples import label_of
from alignkit.data.file_formats import Row
from alignkit.data.read import Rows, Stream
from alignkit.data.verdicts import BadRow
from alignkit.errors import ConfigError, DataError


def controlled(rows: Rows, control: ControlConfig, family: str | None) -> Rows:
    """Labelled rows as demonstrations: the label becomes a system text (`desirable` or
    `undesirable`), before one that the row has itself.

    Source: MEET, arXiv:2310.00819, whose control texts are token sequences too. ConfigError for
    objectives that do not learn from demonstrations, DataError for rows without a label.
    """
    if family not in ("sequence", None):
        raise ConfigError(
            f"data.control: it is for objectives that learn from demonstrations (sft), and this one "
            f"learns from {family} data; leave it out"
        )
    if not {"prompt", "completion", "label"} <= set(rows.columns):
        raise DataError(
            f"{rows.where}: data.control needs labelled completions, columns prompt, completion and "
            f"label (true or false); the columns are {', '.join(rows.columns)}"
        )

    def every() -> Iterator[Row]:
        return (_controlled(row, control) for row in rows.rows)

    in_memory = isinstance(rows.rows, list)
    return replace(rows, rows=list(every()) if in_memory else Stream(every))


def _controlled(row: Row, control: ControlConfig) -> Row:
    if row.values is None:
        return row
    values: Mapping[str, Any] = row.values
    try:
        good = label_of(values.get("label"))
    except BadRow as bad:
        return replace(row, values=None, problem=bad.detail, verdict=bad.verdict)

    texts = [control.desirable if good else control.undesirable, values.get("system")]
    system = "\n\n".join(text for text in texts if isinstance(text, str) and text.strip())
    others = {name: value for name, value in values.items() if name not in ("label", "system")}
    return replace(row, values={**others, "system": system})
