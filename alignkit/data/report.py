"""What was found in the rows: counts per verdict with the first row numbers, as plain lines or a
rich table.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from alignkit.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

Severity = Literal["error", "dropped", "warning", "note"]
SHOWN = 5  # row numbers kept per verdict

# verdict -> (severity, what it means and what to do). Errors stop the run, or drop the row when
# on_bad_row=drop.
VERDICTS: dict[str, tuple[Severity, str]] = {
    "unreadable": (
        "error",
        "a line that is not one JSON object in UTF-8, or longer than the limit",
    ),
    "missing": ("error", "a needed column is missing"),
    "null": ("error", "a needed value is null"),
    "type": ("error", "a value has the wrong type"),
    "messages": ("error", 'not a list of messages [{"role": "user", "content": "..."}]'),
    "role": ("error", "an unknown role, or turns that end with the wrong role"),
    "surrogate": ("error", "characters that are not valid Unicode"),
    "both_empty": ("error", "chosen and rejected are both empty"),
    "template": ("error", "the chat template refuses the conversation"),
    "empty": ("dropped", "an empty completion"),
    "identical": ("dropped", "chosen equals rejected"),
    "overlong": ("dropped", "no completion token is left within data.max_length"),
    "no_prompt": (
        "dropped",
        "an empty prompt, and the tokenizer has neither BOS nor EOS to stand in for it",
    ),
    "no_common_prefix": ("warning", "chosen and rejected of an implicit prompt share no beginning"),
    "contradictory": ("warning", "the same pair occurs with chosen and rejected swapped"),
    "truncated": ("warning", "completions cut at data.max_length"),
    "special_tokens": (
        "warning",
        "special tokens inside the text; data.split_special_tokens=true reads them as plain text",
    ),
    "prompt_repeated": (
        "warning",
        "both completions begin with the prompt; data.format=implicit_pair reads it once",
    ),
    "beyond_context": (
        "warning",
        "longer than the tokenizer's model_max_length; lower data.max_length",
    ),
    "untrained_turn": (
        "warning",
        "an assistant turn that the chat template rewrites is left out of the loss",
    ),
    "no_end": (
        "warning",
        "the chat template ends the completion without a special token: the model is not taught to stop",
    ),
    "duplicate": ("note", "the row repeats an earlier one (kept)"),
    "boundary": ("note", "a token spans the end of the prompt; it belongs to the completions"),
    "bos_once": (
        "note",
        "the text began with BOS and the tokenizer added another; one was removed",
    ),
    "empty_prompt": ("note", "an empty prompt"),
}


@dataclass
class Finding:
    """How often a verdict was given, on which rows first, and what the first one said."""

    count: int = 0
    rows: list[int] = field(default_factory=list)
    detail: str = ""


@dataclass
class Report:
    """The data doctor's findings on one source. Row numbers are line numbers in JSONL files,
    positions from 1 elsewhere.
    """

    source: str
    name: str = "row"  # short form of source, for `name:row` in messages
    format: str = ""
    total: int = 0
    kept: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)
    # tokens, rows that were tokenised, dropped ones included
    prompt_lengths: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # prompt + longest completion, before the cut

    def add(self, verdict: str, row: int, detail: str = "") -> None:
        """Count `verdict` for row number `row`."""
        finding = self.findings.setdefault(verdict, Finding(detail=detail))
        finding.count += 1
        if len(finding.rows) < SHOWN:
            finding.rows.append(row)

    def count(self, verdict: str) -> int:
        """Rows that got `verdict`."""
        return self.findings[verdict].count if verdict in self.findings else 0

    def share(self, verdict: str) -> float:
        """Part of all rows that got `verdict`."""
        return self.count(verdict) / max(self.total, 1)

    def errors(self) -> dict[str, Finding]:
        """Findings on malformed rows."""
        return {
            name: found for name, found in self.findings.items() if VERDICTS[name][0] == "error"
        }

    def warnings(self) -> list[str]:
        """One sentence per warning that deserves attention (cut completions from 5 % on)."""
        ratio = {name: self.share(name) for name in self.findings if VERDICTS[name][0] == "warning"}
        serious = [name for name, share in ratio.items() if name != "truncated" or share > 0.05]
        return [
            f"{self.source}: {self._sentence(name)} ({ratio[name]:.1%} of rows)" for name in serious
        ]

    def malformed(self) -> DataError:
        """The error that stops a run on malformed rows."""
        lines = [f"  {self._sentence(name)}" for name in self.errors()]
        count = sum(found.count for found in self.errors().values())
        remedy = "correct them, or drop and count them with data.on_bad_row=drop"
        return DataError(
            "\n".join(
                [f"{self.source}: {count} of {self.total} rows are malformed; {remedy}", *lines]
            )
        )

    def refusal(self, max_length: int) -> DataError | None:
        """The error for rows that are well formed but cannot teach anything, or None."""
        if not self.total:
            return DataError(f"{self.source} has 0 rows")
        if self.kept and self.count("no_common_prefix") >= self.kept:
            advice = "if there is no prompt, give the rows an empty `prompt`; otherwise map it with data.columns.prompt=NAME"
            return DataError(
                f"{self.source}: chosen and rejected share no beginning in any row; {advice}"
            )
        if self.share("identical") > 0.5:
            return DataError(
                f"{self.source}: chosen equals rejected in {self.share('identical'):.0%} of {self.total} rows"
            )
        if self.kept:
            return None
        if self.share("overlong") > 0.5:
            return DataError(self._too_long(max_length))
        return DataError(
            "\n".join([f"{self.source}: none of {self.total} rows can be used", *self.lines()[1:]])
        )

    def lines(self) -> list[str]:
        """The report as plain text lines."""
        head = f"{self.source}: {self.total} rows read, {self.kept} kept" + (
            f", format {self.format}" if self.format else ""
        )
        body = [
            f"  {severity:8}{count:>7}  {self._sentence(name)}"
            for severity, name, count in self._ordered()
        ]
        return [head, *body, *(f"  {text}" for text in self._token_lines())]

    def table(self) -> "Table":
        """The report as a rich table."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(self.lines()[0]), caption=escape("\n".join(self._token_lines())))
        for column in ("", "verdict", "rows", "first rows", "meaning"):
            table.add_column(column, justify="right" if column == "rows" else "left")
        for severity, name, count in self._ordered():
            found = self.findings[name]
            rows = ", ".join(map(str, found.rows))
            table.add_row(
                severity, name, str(count), rows, escape(found.detail or VERDICTS[name][1])
            )
        return table

    def _ordered(self) -> list[tuple[str, str, int]]:
        return [
            (VERDICTS[name][0], name, self.findings[name].count)
            for name in VERDICTS
            if name in self.findings
        ]

    def _sentence(self, verdict: str) -> str:
        found = self.findings[verdict]
        meaning = VERDICTS[verdict][1]
        rows = ", ".join(map(str, found.rows)) + (", ..." if found.count > len(found.rows) else "")
        detail = f"; {self.name}:{found.rows[0]}: {found.detail}" if found.detail else ""
        return f"{verdict}: {found.count} row{'s' * (found.count > 1)} ({rows}): {meaning}{detail}"

    def _token_lines(self) -> list[str]:
        if not self.lengths:
            return []
        prompts = sorted(self.prompt_lengths)
        rows = sorted(self.lengths)
        middle = len(rows) // 2
        return [
            f"tokens: prompt median {prompts[middle]}, max {prompts[-1]}; whole row median {rows[middle]}, max {rows[-1]}"
        ]

    def _too_long(self, max_length: int) -> str:
        suggested = _round_up(_quantile(self.lengths, 0.95))
        histogram = "\n".join(f"  {line}" for line in histogram_lines(self.lengths))
        return (
            f"{self.source}: every usable row is longer than data.max_length={max_length} before its completion begins\n"
            f"tokens per row:\n{histogram}\ntry data.max_length={suggested}, which holds 95 % of the rows whole"
        )


def histogram_lines(lengths: Sequence[int]) -> list[str]:
    """Counts of `lengths` (tokens) in ranges that double."""
    counts: dict[int, int] = {}
    for length in lengths:
        top = 1 << max(length - 1, 1).bit_length()
        counts[top] = counts.get(top, 0) + 1
    peak = max(counts.values())
    return [
        f"{top // 2 + 1:>7} - {top:<7} {counts[top]:>7} {'#' * -(-30 * counts[top] // peak)}"
        for top in sorted(counts)
    ]


def _quantile(values: Sequence[int], level: float) -> int:
    ordered = sorted(values)
    return ordered[min(int(level * len(ordered)), len(ordered) - 1)]


def _round_up(length: int) -> int:
    step = 64 if length > 64 else 8
    return -(-length // step) * step
