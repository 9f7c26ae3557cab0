"""The data for training reward and preference models: pairs or
rankings, and metrics on held-out ones.
"""

from collections.abc import Sequence

from alignkit.batches import Bundle
from alignkit.data.load import check_held_out, fingerprint, load_bundles
from alignkit.data.report import Report
from alignkit.errors import ConfigError
from alignkit.policies.lazy import changed
from alignkit.policies.scorer import TrainedScorer, joined, separator_of
from alignkit.runs.context import RunContext
from alignkit.runs.job_data import JobData
from alignkit.runs.row_lengths import check_row_lengths
from alignkit.sources.dataset import DatasetSource
from alignkit.training.preference_metrics import PreferenceMetrics


def preference_data(context: RunContext) -> JobData:
    """Bundles for an objective that learns from the model's outputs instead of its log-probs."""
    objective = context.objective
    scorer = context.pair
    train = context.recipe.train
    assert isinstance(scorer, TrainedScorer)  # loaded for a plan with outputs
    if not hasattr(objective, "log_odds"):
        raise ConfigError(
            "objective: reward and preference models cannot be summed in a weighted list"
        )

    bundles, report = _bundles(context, "train")
    check_row_lengths(context, bundles, report.source)
    notes = report.lines()
    source = DatasetSource(
        bundles,
        context.plan,
        train.batch_size,
        seed=train.seed,
        rank=context.rank,
        world=context.processes,
    )

    held_out = None
    measure = None
    if context.recipe.data.eval:
        every_held_out, held_out_report = _bundles(context, "eval")
        check_row_lengths(context, every_held_out, held_out_report.source)
        notes = [*notes, *held_out_report.lines()]
        if context.task is None:
            notes += check_held_out(bundles, every_held_out, held_out_report.source)
        held_out = every_held_out[context.rank :: context.processes]
        measure = PreferenceMetrics(objective, scorer, held_out, int(train.micro_batch_tokens))

    return JobData(
        source=source,
        rows=len(bundles),
        format=report.format,
        identity={"rows": fingerprint(bundles)},
        notes=notes,
        samples=lambda step: [],  # these models score texts, they write none
        evaluation=held_out,
        measure=measure,
    )


def _bundles(context: RunContext, split: str) -> tuple[Sequence[Bundle], Report]:
    """The bundles of `split` (train, eval); where the plan says so, both completions of a pair
    become one text.

    Plain texts get no end token unless `data.append_eos` asks for one: the model is read at the
    last token of the text itself, as reward models are when they score.
    """
    config = context.recipe.data
    tokenizer = context.pair.tokenizer
    if config.append_eos == "auto":
        config = config.model_copy(update={"append_eos": False})

    bundles, report = load_bundles(config, context.plan.data, tokenizer, source=context.rows(split))
    if context.plan.joined:
        separator = separator_of(tokenizer)
        bundles = changed(bundles, lambda place, bundle: joined(bundle, separator))
    return bundles, report
