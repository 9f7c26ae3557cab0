"""The way from a source to bundles or prompts, all steps in order.

`load_bundles` serves objectives that learn from fixed data, `load_prompts` those that sample, and
`check` reports on data without raising (`alignkit data check`).
"""

from collections.abc import Hashable, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from alignkit.config.data import DataConfig
from alignkit.data.examples import Example, make_example
from alignkit.data.formats import conversation_column, detect_format
from alignkit.data.read import Rows, Source, read_rows, renamed
from alignkit.data.report import Report
from alignkit.data.verdicts import BadRow
from alignkit.errors import DataError

if TYPE_CHECKING:
    from alignkit.batches import Bundle
    from alignkit.data.prompts import Prompt


def load_bundles(
    config: DataConfig, family: str, tokenizer: Any, *, source: Source | None = None
) -> tuple[list["Bundle"], Report]:
    """Bundles for an objective of `family` (sequence, pair, labelled, ranked) from `source`
    (default: config.train). For labelled ones a pair becomes two, chosen and rejected.

    Raises DataError for malformed rows (unless on_bad_row is drop) and for data that cannot teach
    anything; ConfigError and ModelError for options the tokenizer cannot serve.
    """
    from alignkit.data.tokenise import tokenize_examples, unpaired

    report, examples = _read_examples(config, family, source, tokenizer)
    _stop_on_malformed_rows(report, config)
    bundles = tokenize_examples(examples, config, tokenizer, report, family)
    report.usable = len(bundles)
    _stop_on_useless_data(report, config)
    return unpaired(bundles) if family == "labelled" else bundles, report


def load_prompts(
    config: DataConfig, tokenizer: Any, *, source: Source | None = None
) -> tuple[list["Prompt"], Report]:
    """Prompts for online objectives; all other columns are kept for the rewards.

    Raises as load_bundles does.
    """
    from alignkit.data.prompts import tokenize_prompts

    report, examples = _read_examples(config, "rollout", source, tokenizer)
    _stop_on_malformed_rows(report, config)
    prompts = tokenize_prompts(examples, config, tokenizer, report)
    report.usable = len(prompts)
    _stop_on_useless_data(report, config)
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
    report, examples = _read_examples(config, family, source, tokenizer)

    if tokenizer is not None and report.format == "prompt":
        from alignkit.data.prompts import tokenize_prompts

        report.usable = len(tokenize_prompts(examples, config, tokenizer, report))
    elif tokenizer is not None:
        from alignkit.data.tokenise import tokenize_examples

        bundles = tokenize_examples(examples, config, tokenizer, report, family or "")
        report.usable = len(bundles)

    if report.errors() and config.on_bad_row == "error":
        return report, report.malformed()
    return report, report.refusal(config.max_length)


def check_held_out(
    training: Sequence["Bundle | Prompt"], evaluation: Sequence["Bundle | Prompt"], where: str
) -> list[str]:
    """A note on the held-out rows that are trained on too; `where` names their source.

    Raises DataError where all of them are, because nothing is held out then.
    """
    trained = {_content(row) for row in training}
    seen = sum(_content(row) in trained for row in evaluation)
    if not seen:
        return []
    if seen == len(evaluation):
        raise DataError(
            f"{where}: every row of data.eval is a row of data.train too, so nothing is held out; "
            "give other rows, name another split of the set with data.eval_split, "
            "or leave data.eval empty"
        )
    return [f"{where}: {seen} of {len(evaluation)} held-out rows are trained on too"]


def _content(row: "Bundle | Prompt") -> Hashable:
    """Equal for rows of equal tokens."""
    from alignkit.batches import Bundle

    if isinstance(row, Bundle):
        parts = [row.prompt, *row.completions, *row.rows.values()]
    else:
        parts = [row.ids]
    return tuple(tuple(part.tolist()) for part in parts)


def fingerprint(bundles: Sequence["Bundle"]) -> str:
    """SHA-256 of what is trained on (token ids, masks, labels,
    order), for the checkpoint's manifest.
    """
    digest = sha256()
    for bundle in bundles:
        labels = [bundle.rows[name] for name in sorted(bundle.rows)]
        for tensor in (bundle.prompt, *bundle.completions, *bundle.masks, *labels):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_examples(
    config: DataConfig, family: str | None, source: Source | None, tokenizer: Any
) -> tuple[Report, list[Example]]:
    """All rows, each checked in the format that the columns of all rows decide. Malformed rows are
    counted in the report. Without a tokenizer a chat template is assumed to be there.
    """
    rows = read_rows(config, source)
    report = Report(rows.where, rows.name, total=len(rows.rows))
    report.places = {row.number: row.place for row in rows.rows if row.place}
    if not rows.rows:
        raise DataError(f"{rows.where} has 0 rows")

    if not rows.columns:  # nothing could be read: there is no format to decide
        for row in rows.rows:
            report.add("unreadable" if row.values is None else "null", row.number, row.problem)
        raise report.malformed()

    rows = renamed(rows, conversation_column(rows.columns, family))
    report.format = detect_format(rows.columns, config.format, family, rows.where)
    template = config.chat_template or getattr(tokenizer, "chat_template", None)
    turns = tokenizer is None or template is not None
    examples = _make_examples(rows, report, family, system_turn=turns and "system" in rows.columns)
    _count_repetitions(examples, report)
    if family == "labelled" and report.format != "labelled":
        for example in examples:
            report.add("unpaired", example.number)
    if template is not None:
        for example in examples:
            if not example.chat:
                report.add("plain_text", example.number)
    report.usable = len(examples)
    return report, examples


def _make_examples(
    rows: Rows, report: Report, family: str | None, *, system_turn: bool
) -> list[Example]:
    examples = []
    for row in rows.rows:
        try:
            example = make_example(row, report.format, family, rows.name, system_turn=system_turn)
        except BadRow as bad:
            report.add_bad(bad, row.number)
            continue
        examples.append(example)
        for verdict in example.verdicts:
            report.add(verdict, row.number)
    return examples


def _count_repetitions(examples: Sequence[Example], report: Report) -> None:
    """Count rows that repeat an earlier one, pairs that contradict an earlier one, and completions
    that repeat the prompt.
    """
    earlier: set[str] = set()
    for example in examples:
        key = example.key()
        if key in earlier:
            report.add("duplicate", example.number)
        if len(example.completions) == 2 and example.key(swapped=True) in earlier:
            report.add("contradictory", example.number)
        if _repeats_the_prompt(example):
            report.add("prompt_repeated", example.number)
        earlier.add(key)


def _repeats_the_prompt(example: Example) -> bool:
    """Whether both completions of a pair of plain texts begin with the prompt."""
    prompt = example.prompt
    if example.chat or not isinstance(prompt, str) or not prompt.strip():
        return False
    pair = len(example.completions) == 2
    return pair and all(str(text).startswith(prompt) for text in example.completions)


def _stop_on_malformed_rows(report: Report, config: DataConfig) -> None:
    if report.errors() and config.on_bad_row == "error":
        raise report.malformed()


def _stop_on_useless_data(report: Report, config: DataConfig) -> None:
    # Tokenising may have counted more malformed rows: those that the chat template refuses.
    _stop_on_malformed_rows(report, config)
    if error := report.refusal(config.max_length):
        raise error
