"""The way from a source to bundles or prompts, all steps in order.

`load_bundles` serves objectives that learn from fixed data, `load_prompts` those that sample, and
`check` reports on data without raising (`alignkit data check`).
"""

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.config.data import DataConfig
from alignkit.config.row_sources import RowSource, TrainSource
from alignkit.data.cache import Entry, LazyTokenizer, entry_of, few_rows
from alignkit.data.checking import Checked, Use, check_rows
from alignkit.data.examples import Example
from alignkit.data.held_out import about_held_out, unlike_trained
from alignkit.data.mixture import Mixture, Part
from alignkit.data.read import HeldOut, Rows, Source, open_source, reading
from alignkit.data.report import Report
from alignkit.distributed.forked import number_of_workers, passed_over
from alignkit.errors import DataError

if TYPE_CHECKING:
    from alignkit.batches import Bundle
    from alignkit.data.prompts import Prompt
    from alignkit.data.tokenise import Cut

    Pack = Callable[[list[Cut]], Any]


def load_bundles(
    config: DataConfig, family: str, tokenizer: Any, *, source: Source | None = None
) -> tuple[Sequence["Bundle"], Report]:
    """Bundles for an objective of `family` (sequence, pair, labelled, ranked) from `source`
    (default: config.train). For labelled ones a pair becomes two, chosen and rejected.

    The bundles of many rows stay on disk, see `data/cache.py`. Raises DataError for malformed rows
    (unless on_bad_row is drop) and for data that cannot teach anything; ConfigError and ModelError
    for options the tokenizer cannot serve.
    """
    rows = open_source(config, source)
    config = reading(config, source)
    few = few_rows(rows)
    lazy = LazyTokenizer.of(tokenizer)
    entry = None if few else entry_of(rows, config, family, lazy)
    bundles: Sequence[Bundle]

    from alignkit.data.stored import StoredBundles, bundles_of

    if entry is None:
        in_memory: list[Bundle] = []
        checked = _tokenised(
            few or rows, config, family, tokenizer, in_memory.extend, bundles_of, stop=True
        )
        bundles = in_memory
    else:
        checked = _cached(entry, rows, config, family, lazy, stop=True)
        bundles = StoredBundles(entry.folder)

    checked.stop_on_useless_data(config)
    return bundles, checked.report


def load_prompts(
    config: DataConfig, tokenizer: Any, *, source: Source | None = None
) -> tuple[list["Prompt"], Report]:
    """Prompts for online objectives; all other columns are kept for the rewards.

    Raises as load_bundles does.
    """
    prompts: list[Prompt] = []
    rows = open_source(config, source)
    config = reading(config, source)
    checked = check_rows(
        few_rows(rows) or rows,
        config,
        "rollout",
        tokenizer,
        lambda format: _into_prompts(config, tokenizer),
        prompts.extend,
        stop=config.on_bad_row == "error",
    )
    checked.stop_on_useless_data(config)
    return prompts, checked.report


def load_mixture(
    config: DataConfig,
    load: Callable[[DataConfig, Source], tuple[Sequence[Any], Report]],
    resolve: Callable[[TrainSource], Source] = lambda source: source,
) -> Mixture[Any]:
    """All sources that are trained on. `load` reads one (as `load_bundles` and `load_prompts` do),
    each with its own columns and format; `resolve` turns what only the caller knows into rows.

    Raises as `load` does, and DataError for a share that is no row of an epoch.
    """
    parts = []
    for source in config.sources():
        parts.append(Part(source, *load(config.reading(source), resolve(source))))

    mixture = Mixture(parts)
    _ = mixture.counts  # refuses a share that is too small
    return mixture


def load_held_out(
    config: DataConfig,
    load: Callable[[DataConfig, Source], tuple[Sequence[Any], Report]],
    resolve: Callable[[RowSource], Source] = HeldOut,
    *,
    fits: Callable[[Sequence[Any], str], list[str]] = lambda rows, where: [],
    training: Sequence[Any],
    stream: str | None = None,
) -> tuple[dict[str, Sequence[Any]], list[str]]:
    """Name -> rows of every set of `data.eval`, where one without a name stands under "", and notes
    on them. `load` and `resolve` are those of `load_mixture`.

    `fits` checks rows of a source and has notes on them; those that are `training` rows too are
    noted, unless a task made them. `stream` is the name of the stream whose rows they are. Raises
    as `load`, `fits` and `check_held_out` do; a DataError says which held-out rows it is about.
    """
    sets: dict[str, Sequence[Any]] = {}
    notes = unlike_trained(config, stream)
    for name, source in config.held_out_sources().items():
        with about_held_out(config, name, stream):
            rows, report = load(config.reading(source), resolve(source))
            notes += [*report.lines(), *fits(rows, report.source)]
            # A task's few rows may be in both of its parts.
            if not source.source.startswith("task:"):
                notes += check_held_out(training, rows, report.source)
        sets[name] = rows
    return sets, notes


def check(
    config: DataConfig,
    tokenizer: Any = None,
    *,
    family: str | None = None,
    source: Source | None = None,
) -> tuple[Report, DataError | None]:
    """Read every row and report; the error is what `load_bundles` would stop with. Without a
    tokenizer only text is checked. A tokenizer that is a `LazyTokenizer` is loaded when it is needed.
    """
    rows = open_source(config, source)
    config = reading(config, source)
    few = few_rows(rows)
    lazy = None if tokenizer is None else LazyTokenizer.of(tokenizer)
    entry = None if few or lazy is None else entry_of(rows, config, family, lazy)

    if lazy is None:
        checked = check_rows(few or rows, config, family, None, _as_text, stop=False)
    elif entry is not None:
        checked = _cached(entry, rows, config, family, lazy, stop=False)
    else:
        checked = _tokenised(few or rows, config, family, lazy.load(), stop=False)

    report = checked.report
    if report.errors() and config.on_bad_row == "error":
        return report, report.malformed()
    return report, report.refusal(config.max_length)


def _cached(
    entry: Entry,
    rows: Rows,
    config: DataConfig,
    family: str | None,
    tokenizer: LazyTokenizer,
    *,
    stop: bool,
) -> Checked:
    """What the entry of the cache says about the rows, made if it is not there."""

    def build(folder: Path) -> Checked:
        from alignkit.data.stored import BundleWriter, pack

        loaded = tokenizer.load()
        workers = number_of_workers(config.workers)
        with passed_over(), BundleWriter(folder) as writer:
            checked = _tokenised(
                rows, config, family, loaded, writer.write, pack, stop=stop, workers=workers
            )
        if stop:  # what is not whole is not kept
            checked.stop_on_malformed_rows(config)
        return checked

    return entry.made(build, rows)


def _tokenised(
    rows: Rows,
    config: DataConfig,
    family: str | None,
    tokenizer: Any,
    take: Callable[[Any], None] = lambda packed: None,
    pack: "Pack" = lambda cuts: None,
    *,
    stop: bool,
    workers: int = 1,
) -> Checked:
    """Check the rows and `take` what `pack` makes of their tokens, part by part, in the process that
    made these. Prompts are counted alone.
    """

    def use(format: str) -> Use:
        if format == "prompt":
            count = _into_prompts(config, tokenizer)
            return lambda examples, report: (count(examples, report)[0], pack([]))
        return _into_bundles(config, family, tokenizer, pack)

    stop = stop and config.on_bad_row == "error"
    return check_rows(rows, config, family, tokenizer, use, take, stop=stop, workers=workers)


def _into_bundles(config: DataConfig, family: str | None, tokenizer: Any, pack: "Pack") -> Use:
    from alignkit.data.tokenise import Tokeniser, unpaired

    tokeniser = Tokeniser(config, tokenizer, family or "")

    def use(examples: Sequence[Example], report: Report) -> tuple[int, Any]:
        cuts = tokeniser.cuts(examples, report)
        return len(cuts), pack(unpaired(cuts) if family == "labelled" else cuts)

    return use


def _into_prompts(config: DataConfig, tokenizer: Any) -> Use:
    from alignkit.data.prompts import tokenize_prompts

    def use(examples: Sequence[Example], report: Report) -> tuple[int, list["Prompt"]]:
        prompts = tokenize_prompts(examples, config, tokenizer, report)
        return len(prompts), prompts

    return use


def _as_text(format: str) -> Use:
    return lambda examples, report: (len(examples), None)


def check_held_out(
    training: Sequence["Bundle | Prompt"], evaluation: Sequence["Bundle | Prompt"], where: str
) -> list[str]:
    """A note on the held-out rows that are trained on too; `where` names their source.

    Raises DataError where all of them are, because nothing is held out then.
    """
    from alignkit.data.stored import contents

    trained = set(contents(training))
    seen = sum(content in trained for content in contents(evaluation))
    if not seen:
        return []
    if seen == len(evaluation):
        raise DataError(
            f"{where}: every held-out row is trained on too, so nothing is held out; give other rows"
        )
    return [f"{where}: {seen} of {len(evaluation)} held-out rows are trained on too"]


def fingerprint(bundles: Sequence["Bundle"]) -> str:
    """SHA-256 of what is trained on (token ids, masks, labels,
    order), for the checkpoint's manifest.
    """
    from alignkit.data.stored import StoredBundles, trained_on
    from alignkit.policies.lazy import Joined

    if isinstance(bundles, StoredBundles):
        return bundles.fingerprint
    digest = sha256()
    if isinstance(bundles, Joined):
        digest.update("".join(map(fingerprint, bundles.parts)).encode())
        return digest.hexdigest()
    for bundle in bundles:
        digest.update(trained_on(bundle))
    return digest.hexdigest()
