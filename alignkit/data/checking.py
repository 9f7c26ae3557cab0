"""Going through all rows of a source: each is checked, and what is left is handed on in parts, so
that a source may be larger than the memory.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from typing import Any

from alignkit.config.data import DataConfig
from alignkit.data.control import controlled
from alignkit.data.examples import Example, make_example
from alignkit.data.file_formats import Row
from alignkit.data.formats import conversation_column, detect_format
from alignkit.data.read import Rows, renamed
from alignkit.data.report import Report
from alignkit.data.rewrites import rewrites
from alignkit.data.steps import COLUMNS as STEP_COLUMNS
from alignkit.data.steps import stepwise
from alignkit.data.verdicts import BadRow
from alignkit.distributed.forked import in_order
from alignkit.errors import DataError

PART = 500  # rows that are in memory at once

# Gets the examples of a part, and a report for what it sees in them; returns how many it can use,
# and what it makes of them.
Use = Callable[[Sequence[Example], Report], tuple[int, Any]]


@dataclass
class Checked:
    """What the rows of a source are like."""

    report: Report
    # The report before anything was made of the rows: what stops a run on malformed ones.
    as_read: Report

    def stop_on_malformed_rows(self, config: DataConfig) -> None:
        """DataError where rows are malformed, unless they are to be dropped."""
        if config.on_bad_row == "error":
            for report in (self.as_read, self.report):
                if report.errors():
                    raise report.malformed()

    def stop_on_useless_data(self, config: DataConfig) -> None:
        """DataError where rows are malformed or cannot teach anything."""
        self.stop_on_malformed_rows(config)
        if error := self.report.refusal(config.max_length):
            raise error


def check_rows(
    rows: Rows,
    config: DataConfig,
    family: str | None,
    tokenizer: Any,
    use: Callable[[str], Use],
    take: Callable[[Any], None] = lambda made: None,
    *,
    stop: bool,
    workers: int = 1,
) -> Checked:
    """Check every row in the format that the columns of all rows decide, and hand the examples on.

    `use` is asked with the format for what is done with the examples, part by part, in so many
    processes; with `stop` it gets no more of them once a row was malformed. `take` gets what was
    made of each part, in the order of the rows. Malformed rows are counted. Without a tokenizer a
    chat template is assumed to be there. Raises DataError for columns that cannot be used.
    """
    rows, format = with_format(rows, config, family)
    template = config.chat_template or getattr(tokenizer, "chat_template", None)
    going = _Check(
        rows,
        format,
        family,
        system_turn=(tokenizer is None or template is not None) and "system" in rows.columns,
        has_template=template is not None,
    )

    use_part = use(format)

    def used(examples: Sequence[Example]) -> tuple[Report, Any]:
        seen = Report(rows.where, places={e.number: e.uid for e in examples if e.has_place})
        seen.usable, made = use_part(examples, seen)
        seen.forget_places()
        return seen, made

    all_examples = map(going.examples, _parts(rows.rows))
    parts = (part for part in all_examples if not (stop and going.report.errors()))
    of_use = Report(rows.where)
    for seen, made in in_order(used, parts, workers):
        of_use.add_all(seen)
        of_use.usable += seen.usable
        of_use.forget_places()
        take(made)

    as_read = going.whole_report()
    report = Report(rows.where, rows.name, format, as_read.total, of_use.usable)
    report.add_all(as_read)
    report.add_all(of_use)
    return Checked(report, as_read)


def with_format(rows: Rows, config: DataConfig, family: str | None) -> tuple[Rows, str]:
    """The rows under our names of the columns, and their format. DataError for columns that an
    objective of `family` cannot use, and where there are none.
    """
    rows = renamed(rows, config.columns)
    if not rows.columns:  # nothing could be read: there is no format to decide
        report = Report(rows.where, rows.name)
        for row in rows.rows:
            report.total += 1
            report.places |= {row.number: row.place} if row.place else {}
            report.add("unreadable" if row.values is None else "null", row.number, row.problem)
        if not report.total:
            raise DataError(f"{rows.where} has 0 rows")
        raise report.malformed()

    rows = renamed(rows, conversation_column(rows.columns, family))
    if family == "labelled" and set(rows.columns) >= STEP_COLUMNS:
        rows = stepwise(rows, config.step_separator)
    if config.control is not None:
        rows = controlled(rows, config.control, family)
    if config.rewrite is not None:
        return rewrites(rows, config.rewrite, family), "completion"
    return rows, detect_format(rows.columns, config.format, family, rows.where)


def _parts(rows: Iterable[Row]) -> Iterator[list[Row]]:
    remaining = iter(rows)
    while part := list(islice(remaining, PART)):
        yield part


@dataclass
class _Check:
    """The checks of rows by themselves, and of each against the ones before."""

    rows: Rows
    format: str
    family: str | None
    system_turn: bool
    has_template: bool
    earlier: set[bytes] = field(default_factory=set)  # keys of the examples so far
    labels: set[bool] = field(default_factory=set)  # of the examples so far
    has_margins: bool = False  # whether an example so far has one

    def __post_init__(self) -> None:
        self.report = Report(self.rows.where, self.rows.name, self.format)

    def examples(self, part: Sequence[Row]) -> list[Example]:
        """The examples in a part of the rows; what is wrong with the others is counted."""
        self.report.total += len(part)
        self.report.places |= {row.number: row.place for row in part if row.place}

        examples = []
        for row in part:
            try:
                example = self._example(row)
            except BadRow as bad:
                self.report.add_bad(bad, row.number)
                continue
            examples.append(example)
            self._count_notes(example)
            self._count_repetition(example)

        self.report.usable += len(examples)
        self.report.forget_places()
        return examples

    def whole_report(self) -> Report:
        """The report on all rows, when there are no more of them."""
        if len(self.labels) > 1:
            del self.report.findings["one_label"]
        if not self.has_margins:
            self.report.findings.pop("no_margin", None)
        return self.report

    def _example(self, row: Row) -> Example:
        return make_example(
            row, self.format, self.family, self.rows.name, system_turn=self.system_turn
        )

    def _count_notes(self, example: Example) -> None:
        for verdict in example.verdicts:
            self.report.add(verdict, example.number)
        if self.family == "labelled" and self.format != "labelled":
            self.report.add("unpaired", example.number)
        if self.has_template and not example.chat:
            self.report.add("plain_text", example.number)
        if example.label is not None:  # taken back once the other label is there too
            self.report.add("one_label", example.number)
            self.labels.add(example.label)
        self._count_margin(example)

    def _count_margin(self, example: Example) -> None:
        """Count a pair without a margin; that is taken back where no row has one."""
        if example.margin is not None:
            self.has_margins = True
        elif self.family == "ranked" and self.format != "ranking":
            self.report.add("no_margin", example.number)

    def _count_repetition(self, example: Example) -> None:
        """Count a row that repeats an earlier one, a pair that contradicts an earlier one, and
        completions that repeat the prompt.
        """
        key = _hash(example.key())
        if key in self.earlier:
            self.report.add("duplicate", example.number)
        opposite = len(example.completions) == 2 or example.label is not None
        if opposite and _hash(example.key(swapped=True)) in self.earlier:
            self.report.add("contradictory", example.number)
        if _repeats_the_prompt(example):
            self.report.add("prompt_repeated", example.number)
        self.earlier.add(key)


def _hash(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _repeats_the_prompt(example: Example) -> bool:
    """Whether both completions of a pair of plain texts begin with the prompt."""
    prompt = example.prompt
    if example.chat or not isinstance(prompt, str) or not prompt.strip():
        return False
    pair = len(example.completions) == 2
    return pair and all(str(text).startswith(prompt) for text in example.completions)
