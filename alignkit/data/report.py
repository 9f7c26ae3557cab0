"""What the rows of a source are like: counts per verdict with the first row numbers, as plain lines
or a rich table.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from alignkit.data.verdicts import VERDICTS, BadRow, Severity
from alignkit.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 5  # row numbers remembered per verdict
FEW = 0.05  # cut completions are worth a warning above this share of the rows


@dataclass
class Finding:
    """How often a verdict was given, on which rows first, and the detail of the first one."""

    count: int = 0
    rows: list[int] = field(default_factory=list)
    detail: str = ""


@dataclass
class Report:
    """The findings on one source.

    Row numbers are line numbers in JSONL files, positions from 1 elsewhere.
    """

    source: str
    name: str = "row"  # short form of source, for `name:row` in messages
    format: str = ""
    total: int = 0  # rows that were read
    usable: int = 0  # rows that are left to train on
    findings: dict[str, Finding] = field(default_factory=dict)
    places: dict[int, str] = field(default_factory=dict)  # of rows that lie in several files

    # In tokens -> rows of that length, of all that were tokenised, rows that were dropped later
    # included. A length is that of the prompt and the longest completion, before the cut.
    prompt_lengths: Counter[int] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)

    def add(self, verdict: str, row: int, detail: str = "") -> None:
        """Count `verdict` for row number `row`."""
        finding = self.findings.setdefault(verdict, Finding(detail=detail))
        finding.count += 1
        if len(finding.rows) < SHOWN:
            finding.rows.append(row)

    def add_bad(self, bad: BadRow, row: int) -> None:
        """Count the verdict with which row number `row` left the data."""
        self.add(bad.verdict, row, bad.detail)

    def add_all(self, other: "Report") -> None:
        """Count what `other` found in the same rows, behind one's own findings."""
        for verdict, finding in other.findings.items():
            own = self.findings.setdefault(verdict, Finding(detail=finding.detail))
            own.count += finding.count
            own.rows += finding.rows[: SHOWN - len(own.rows)]
        self.places |= other.places
        self.prompt_lengths += other.prompt_lengths
        self.lengths += other.lengths

    def forget_places(self) -> None:
        """Keep the places of those rows alone that the report names."""
        named = {row for finding in self.findings.values() for row in finding.rows}
        self.places = {row: place for row, place in self.places.items() if row in named}

    def as_json(self) -> dict[str, Any]:
        """The report as JSON, without the source's name; `from_json` reads it."""
        content = {key: value for key, value in vars(self).items() if key != "source"}
        content["findings"] = {name: vars(finding) for name, finding in self.findings.items()}
        for name in ("places", "prompt_lengths", "lengths"):  # JSON has no keys that are numbers
            content[name] = sorted(content[name].items())
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: str) -> "Report":
        """The report that `as_json` wrote, about `source`."""
        findings = {verdict: Finding(**values) for verdict, values in content["findings"].items()}
        changed = {
            "findings": findings,
            "places": dict(content["places"]),
            "prompt_lengths": Counter(dict(content["prompt_lengths"])),
            "lengths": Counter(dict(content["lengths"])),
        }
        return cls(source, **{**content, **changed})

    def count(self, verdict: str) -> int:
        """Rows that got `verdict`."""
        return self.findings[verdict].count if verdict in self.findings else 0

    def share(self, verdict: str) -> float:
        """Part of all rows that got `verdict`, from 0 to 1."""
        return self.count(verdict) / max(self.total, 1)

    def errors(self) -> dict[str, Finding]:
        """Findings on malformed rows."""
        return {
            verdict: finding
            for verdict, finding in self.findings.items()
            if VERDICTS[verdict][0] == "error"
        }

    def warnings(self) -> list[str]:
        """One sentence per warning that deserves attention (cut completions from 5 % on)."""
        sentences = []
        for verdict in self.findings:
            share = self.share(verdict)
            harmless = verdict == "truncated" and share <= FEW
            if VERDICTS[verdict][0] == "warning" and not harmless:
                sentences.append(f"{self.source}: {self._sentence(verdict)} ({share:.1%} of rows)")
        return sentences

    def malformed(self) -> DataError:
        """The error that stops a run on malformed rows."""
        count = sum(finding.count for finding in self.errors().values())
        head = (
            f"{self.source}: {count} of {self.total} rows are malformed; "
            "correct them, or drop and count them with data.on_bad_row=drop"
        )
        return DataError(
            "\n".join([head, *(f"  {self._sentence(name)}" for name in self.errors())])
        )

    def refusal(self, max_length: int) -> DataError | None:
        """The error for rows that are well formed but cannot teach anything, or None."""
        if not self.total:
            return DataError(f"{self.source} has 0 rows")

        if self.usable and self.count("no_common_prefix") >= self.usable:
            return DataError(
                f"{self.source}: chosen and rejected share no beginning in any row; "
                "if there is no prompt, give the rows an empty `prompt`; "
                "otherwise map it with data.columns.prompt=NAME"
            )
        if self.share("identical") > 0.5:
            share = self.share("identical")
            detail = self.findings["identical"].detail
            if self.count("unknown_tokens"):
                detail += f"; {VERDICTS['unknown_tokens'][1]}"
            return DataError(
                f"{self.source}: chosen equals rejected in {share:.0%} of {self.total} rows"
                + (f" ({detail})" if detail else "")
            )
        if self.usable:
            return None

        # Nothing is left. Where that is because of the length, a better one can be suggested.
        if self.share("overlong") > 0.5:
            return DataError(self._too_long(max_length))
        head = f"{self.source}: none of {self.total} rows can be used"
        return DataError("\n".join([head, *self.lines()[1:]]))

    def lines(self) -> list[str]:
        """The report as plain text lines."""
        head = f"{self.source}: {self.total} rows read, {self.usable} kept"
        if self.format:
            head += f", format {self.format}"
        body = [
            f"  {severity:8}{count:>7}  {self._sentence(verdict)}"
            for severity, verdict, count in self._ordered()
        ]
        return [head, *body, *(f"  {text}" for text in self._token_lines())]

    def table(self) -> "Table":
        """The report as a rich table."""
        from rich.table import Table

        from alignkit.config.escaping import plain

        table = Table(title=plain(self.lines()[0]), caption=plain("\n".join(self._token_lines())))
        for column in ("", "verdict", "rows", "first rows", "meaning"):
            table.add_column(column, justify="right" if column == "rows" else "left")

        for severity, verdict, count in self._ordered():
            finding = self.findings[verdict]
            rows = ", ".join(map(self._row, finding.rows))
            meaning = finding.detail or VERDICTS[verdict][1]
            table.add_row(severity, verdict, str(count), rows, plain(meaning))
        return table

    def _ordered(self) -> list[tuple[Severity, str, int]]:
        """Severity, verdict and count of every finding, in the order of VERDICTS."""
        return [
            (severity, verdict, self.findings[verdict].count)
            for verdict, (severity, _) in VERDICTS.items()
            if verdict in self.findings
        ]

    def _row(self, number: int) -> str:
        return self.places.get(number, str(number))

    def _sentence(self, verdict: str) -> str:
        finding = self.findings[verdict]
        plural = "s" if finding.count > 1 else ""
        more = ", ..." if finding.count > len(finding.rows) else ""
        rows = ", ".join(map(self._row, finding.rows)) + more
        first = self.places.get(finding.rows[0], f"{self.name}:{finding.rows[0]}")
        detail = f"; {first}: {finding.detail}" if finding.detail else ""
        meaning = VERDICTS[verdict][1]
        return f"{verdict}: {finding.count} row{plural} ({rows}): {meaning}{detail}"

    def _token_lines(self) -> list[str]:
        if not self.lengths:
            return []
        medians = [_quantile(lengths, 0.5) for lengths in (self.prompt_lengths, self.lengths)]
        return [
            f"tokens: prompt median {medians[0]}, max {max(self.prompt_lengths)}; "
            f"whole row median {medians[1]}, max {max(self.lengths)}"
        ]

    def _too_long(self, max_length: int) -> str:
        suggested = _round_up(_quantile(self.lengths, 0.95))
        histogram = "\n".join(f"  {line}" for line in histogram_lines(self.lengths))
        return (
            f"{self.source}: every usable row is longer than data.max_length={max_length} "
            f"before its completion begins\ntokens per row:\n{histogram}\n"
            f"try data.max_length={suggested}, which holds 95 % of the rows whole"
        )


def histogram_lines(lengths: Mapping[int, int]) -> list[str]:
    """How many rows have `lengths` (tokens -> rows), in ranges that double."""
    counts: Counter[int] = Counter()
    for length, rows in lengths.items():
        counts[1 << max(length - 1, 1).bit_length()] += rows
    peak = max(counts.values())
    return [
        f"{top // 2 + 1:>7} - {top:<7} {counts[top]:>7} {'#' * -(-30 * counts[top] // peak)}"
        for top in sorted(counts)
    ]


def _quantile(lengths: Counter[int], level: float) -> int:
    """The length of the row at `level` (0 to 1) of all rows in the order of their lengths."""
    place = min(int(level * lengths.total()), lengths.total() - 1)
    for length in sorted(lengths):
        place -= lengths[length]
        if place < 0:
            break
    return length


def _round_up(length: int) -> int:
    step = 64 if length > 64 else 8
    return -(-length // step) * step
