"""The door of this room: load_bundles for fixed data, load_prompts for online objectives, check for
the data doctor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from alignkit.config.data import DataConfig
from alignkit.data.examples import BadRow, Example, Text, example
from alignkit.data.formats import detect
from alignkit.data.read import Rows, Source, read_rows
from alignkit.data.report import Report
from alignkit.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.batches import Bundle


@dataclass(frozen=True)
class Prompt:
    """One prompt of an online objective."""

    ids: (
        "Tensor"  # [P] int64, at least one token; a chat's ends where the assistant begins to write
    )
    text: Text  # as it stood in the data: what rewards and judges see
    uid: str
    columns: Mapping[str, Any]  # the row's other columns: a reward's keyword arguments


def load_bundles(
    config: DataConfig, family: str, tokenizer: Any, *, source: Source | None = None
) -> tuple[list["Bundle"], Report]:
    """Bundles for an objective of `family` (sequence, pair, labelled) from `source` (default:
    config.train).

    Errors: DataError for malformed rows (unless on_bad_row is drop) and for data that cannot teach
    anything; ConfigError and ModelError for options the tokenizer cannot serve.
    """
    report, examples = _examples(config, family, source)
    if report.errors() and config.on_bad_row == "error":
        raise report.malformed()
    bundles = _tokenise(examples, config, tokenizer, report, family)
    _refuse(report, config)
    return bundles, report


def load_prompts(
    config: DataConfig, tokenizer: Any, *, source: Source | None = None
) -> tuple[list[Prompt], Report]:
    """Prompts for online objectives; all other columns are kept for the rewards. Errors as in
    load_bundles.
    """
    from alignkit.data.prompts import tokenise_prompts

    report, examples = _examples(config, "rollout", source)
    if report.errors() and config.on_bad_row == "error":
        raise report.malformed()
    ids = tokenise_prompts(examples, config, tokenizer, report)
    prompts = [
        Prompt(ids[e.number], e.prompt or "", e.uid, e.columns) for e in examples if e.number in ids
    ]
    report.kept = len(prompts)
    _refuse(report, config)
    return prompts, report


def check(
    config: DataConfig,
    tokenizer: Any = None,
    *,
    family: str | None = None,
    source: Source | None = None,
) -> tuple[Report, DataError | None]:
    """Read every row and report; the error is what `load_bundles` would stop with. Without a
    tokenizer only text is checked.
    """
    report, examples = _examples(config, family, source)
    if tokenizer is not None and report.format == "prompt":
        from alignkit.data.prompts import tokenise_prompts

        report.kept = len(tokenise_prompts(examples, config, tokenizer, report))
    elif tokenizer is not None:
        _tokenise(examples, config, tokenizer, report, family or "")
    stop = report.errors() and config.on_bad_row == "error"
    return report, report.malformed() if stop else report.refusal(config.max_length)


def fingerprint(bundles: Sequence["Bundle"]) -> str:
    """SHA-256 of what is trained on (token ids, masks, labels, order), for the checkpoint's
    manifest.
    """
    digest = sha256()
    for bundle in bundles:
        parts = [
            bundle.prompt,
            *bundle.completions,
            *bundle.masks,
            *(bundle.rows[name] for name in sorted(bundle.rows)),
        ]
        for part in parts:
            digest.update(
                f"{part.dtype}{tuple(part.shape)}".encode() + part.contiguous().numpy().tobytes()
            )
    return digest.hexdigest()


def _examples(
    config: DataConfig, family: str | None, source: Source | None
) -> tuple[Report, list[Example]]:
    """All rows, each checked in the format that the columns of all rows decide."""
    rows = read_rows(config, source)
    report = Report(rows.where, rows.name, total=len(rows.rows))
    if not rows.rows:
        raise DataError(f"{rows.where} has 0 rows")
    if not rows.columns:  # nothing could be read: there is no format to decide
        for row in rows.rows:
            report.add("unreadable" if row.values is None else "null", row.number, row.problem)
        raise report.malformed()
    report.format = detect(rows.columns, config.format, family, rows.where)
    examples = _checked(rows, report, family)
    _compare(examples, report)
    report.kept = len(examples)
    return report, examples


def _checked(rows: Rows, report: Report, family: str | None) -> list[Example]:
    examples = []
    for row in rows.rows:
        try:
            examples.append(example(row, report.format, family, rows.name))
        except BadRow as bad:
            report.add(bad.verdict, row.number, bad.detail)
    return examples


def _compare(examples: Sequence[Example], report: Report) -> None:
    """Duplicates, and pairs that contradict an earlier one."""
    seen: set[str] = set()
    for made in examples:
        key = made.key()
        if key in seen:
            report.add("duplicate", made.number)
        if len(made.completions) == 2 and made.key(swapped=True) in seen:
            report.add("contradictory", made.number)
        texts = [text for text in (made.prompt, *made.completions) if isinstance(text, str)]
        if (
            len(texts) == 3
            and texts[0].strip()
            and all(text.startswith(texts[0]) for text in texts[1:])
        ):
            report.add("prompt_repeated", made.number)
        seen.add(key)


def _tokenise(
    examples: Sequence[Example], config: DataConfig, tokenizer: Any, report: Report, family: str
) -> list["Bundle"]:
    from alignkit.data.tokenise import tokenise

    bundles = tokenise(examples, config, tokenizer, report, family)
    report.kept = len(bundles)
    return bundles


def _refuse(report: Report, config: DataConfig) -> None:
    if (
        report.errors() and config.on_bad_row == "error"
    ):  # found while tokenising: the chat template's refusals
        raise report.malformed()
    if error := report.refusal(config.max_length):
        raise error
