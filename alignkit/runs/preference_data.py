"""The data for training reward and preference models: pairs or
rankings, and metrics on held-out ones.
"""

from collections.abc import Sequence
from functools import partial

from alignkit.batches import Bundle
from alignkit.config.data import DataConfig
from alignkit.data.load import (
    fingerprint,
    load_bundles,
    load_mixture,
)
from alignkit.data.read import Source
from alignkit.data.report import Report
from alignkit.errors import ConfigError
from alignkit.objectives.base import Weighted
from alignkit.policies.lazy import changed
from alignkit.policies.scorer import TrainedScorer, joined, separator_of
from alignkit.runs.context import RunContext
from alignkit.runs.job_data import JobData, held_out_of, shares_of
from alignkit.runs.row_lengths import check_row_lengths
from alignkit.sources.dataset import DatasetSource, order_of
from alignkit.training.held_out_sets import measured_on
from alignkit.training.preference_metrics import LabelMetrics, PreferenceMetrics


def preference_data(context: RunContext) -> JobData:
    """Bundles for an objective that learns from the model's outputs instead of its log-probs."""
    objective = context.objective
    scorer = context.pair
    train = context.recipe.train
    assert isinstance(scorer, TrainedScorer)  # loaded for a plan with outputs
    if isinstance(objective, Weighted):
        raise ConfigError(
            "objective: reward and preference models cannot be summed in a weighted list"
        )

    load = partial(_bundles, context)
    mixture = load_mixture(context.recipe.data, load, context.training_rows)
    bundles = mixture.rows
    for part in mixture.parts:
        check_row_lengths(context, part.rows, part.report.source)
    notes = mixture.lines()
    source = DatasetSource(
        bundles,
        context.plan,
        train.batch_size,
        seed=train.seed,
        rank=context.rank,
        world=context.processes,
        order=order_of(mixture, train.seed),
    )

    held_out, about_held_out = held_out_of(context, load, check_row_lengths, bundles)
    notes += about_held_out

    shares = shares_of(context, held_out)
    budget = int(train.micro_batch_tokens)
    measure = LabelMetrics if context.plan.data == "labelled" else PreferenceMetrics
    measures = {
        name: measure(objective, scorer, rows, budget) for name, rows in (shares or {}).items()
    }

    return JobData(
        source=source,
        rows=len(bundles),
        format=mixture.format,
        identity={"rows": fingerprint(bundles), **mixture.identity()},
        notes=notes,
        samples=lambda step: [],  # these models score texts, they write none
        evaluation=shares,
        measure=measured_on(measures),
    )


def _bundles(
    context: RunContext, config: DataConfig, source: Source
) -> tuple[Sequence[Bundle], Report]:
    """The bundles of one source; where the plan says so, both completions of a pair
    become one text.

    Plain texts get no end token unless `data.append_eos` asks for one: the model is read at the
    last token of the text itself, as reward models are when they score.
    """
    tokenizer = context.pair.tokenizer
    if config.append_eos == "auto":
        config = config.model_copy(update={"append_eos": False})

    bundles, report = load_bundles(config, context.plan.data, tokenizer, source=source)
    if context.plan.joined:
        separator = separator_of(tokenizer)
        bundles = changed(bundles, lambda place, bundle: joined(bundle, separator))
    return bundles, report
