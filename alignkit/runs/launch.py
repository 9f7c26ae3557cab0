"""From a recipe to a finished run: check it, load models and data, resolve every `auto`, and hand a
job to the loop.

Importing this imports no torch, so that a mistake in a recipe is reported at once; what needs torch
is imported by the functions below after `check_without_torch`.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.config.recipe import Recipe, dump_recipe
from alignkit.config.streams import objective_of
from alignkit.distributed.launcher import end
from alignkit.errors import ConfigError, DataError
from alignkit.runs.checks import check_with_torch, check_without_torch
from alignkit.runs.live import LiveTask
from alignkit.runs.resume import (
    check_output,
    check_recorded_recipe,
    check_unsigned_result,
    fill_autos,
    identity_of,
    measured_autos,
    told_apart,
    with_resolved_autos,
)
from alignkit.runs.streams import check_streams, parts_of_run, unused_by_all
from alignkit.tasks import DEFAULT_TASK, Task, resolve

if TYPE_CHECKING:
    from accelerate import Accelerator

    from alignkit.objectives.base import Objective
    from alignkit.policies.pair import PolicyPair
    from alignkit.runs.context import RunContext
    from alignkit.runs.job_data import JobData
    from alignkit.training.job import Job, Result
    from alignkit.training.run_folder import RunFolder

log = logging.getLogger("alignkit")


def run_recipe(
    recipe: Recipe,
    resume: str | None = None,
    *,
    safe: bool = False,
    objective: "Objective | None" = None,
) -> "Result":
    """Run a recipe to its end in this process. `resume` is None, "auto" or a checkpoint folder.

    `safe` refuses everything by which a recipe could run code of its own. `objective` is the
    recipe's, where the caller has built it already. Errors carry their exit code (alignkit.errors).
    """
    check_without_torch(recipe, safe)
    check_output(recipe, resume)
    if objective is None:
        objective = objective_of(recipe, safe=safe)
    return _run(recipe, objective, None, resume, safe, [], {})[1]


def run_with_task(
    recipe: Recipe,
    objective: "Objective",
    task: Task,
    *,
    resume: str | None = None,
    safe: bool = False,
    notes: Sequence[str] = (),
    identity: Mapping[str, Any] | None = None,
) -> "Job":
    """Run a recipe whose objective, and perhaps model, rows, reward or judge, are objects.

    `notes` are printed at the start; `identity` is added to what a resumed run must match. Returns
    the finished job, whose pair holds the trained weights. Otherwise as `run_recipe`.
    """
    check_without_torch(recipe, safe)
    check_output(recipe, resume)
    return _run(recipe, objective, task, resume, safe, notes, identity or {})[0]


def _run(
    recipe: Recipe,
    objective: "Objective",
    task: Task | None,
    resume: str | None,
    safe: bool,
    notes: Sequence[str],
    identity: Mapping[str, Any],
) -> tuple["Job", "Result"]:
    from alignkit.distributed.errors import raise_on_all_ranks
    from alignkit.policies.adapters import start_of
    from alignkit.runs.hub import push_model
    from alignkit.training.loop import train
    from alignkit.training.run_folder import RunFolder

    changes: list[str] = []
    recipe = recipe.model_copy(update={"model": start_of(recipe.model)})
    if resume is not None:
        recipe, changes = with_resolved_autos(recipe)
        check_unsigned_result(recipe)
        check_recorded_recipe(recipe, resume)

    check_streams(recipe, objective)
    if task is None:
        task = resolve_task(recipe)
    for part, own in parts_of_run(recipe, objective):
        check_with_torch(part, own, task)

    accelerator = make_accelerator(recipe)
    run = RunFolder(recipe.output_dir, writes=accelerator.is_main_process)
    try:
        context = load_context(recipe, objective, task, accelerator, safe=safe)
        data = _load_data(context, resume)
        recipe = fill_autos(context.recipe, {"data": {"format": data.format}})
        job = build_job(replace(context, recipe=recipe), data, run, notes=[*notes, *changes])
        job.identity = {**job.identity, **identity}

        with ExitStack() as stack:
            with raise_on_all_ranks(accelerator):  # only the first process takes the run's lock
                stack.enter_context(run)
            result = train(job, resume)
            with raise_on_all_ranks(accelerator):
                if recipe.hub is not None and run.writes:
                    log.info("pushed to %s", push_model(run.model, recipe.hub))
            return job, result
    finally:
        end(accelerator)


def _load_data(context: "RunContext", resume: str | None) -> "JobData":
    """As `load_data`; where a run is resumed, errors say that it was trained on other data."""
    try:
        return load_data(context)
    except DataError as error:
        if resume is None:
            raise
        raise told_apart(error, context.recipe) from error


def resolve_task(recipe: Recipe) -> Task | None:
    """The embedded task that a model or the data name, made on
    first use; None where neither does.

    ConfigError where the training and the held-out rows name two tasks.
    """
    data = recipe.data
    named = [*data.sources(), *data.held_out_sources().values()]
    sources = [row.source for row in named if row.source.startswith("task:")]
    if len(set(sources)) > 1:
        place = recipe.origin.at(("data", "eval"))
        raise ConfigError(
            f"{place}: `data.train` and `data.eval` name two tasks: "
            f"{', '.join(dict.fromkeys(sources))}"
        )
    models = [recipe.model.name_or_path, recipe.teacher.name_or_path if recipe.teacher else None]
    if not sources and "task" not in models:
        return None
    return resolve(sources[0] if sources else DEFAULT_TASK)


def make_accelerator(recipe: Recipe) -> "Accelerator":
    """accelerate's handle on devices, processes, precision and trackers.

    The reduction accumulates gradients, so accelerate does not. ConfigError for a tracker that is
    not installed.
    """
    from datetime import timedelta

    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    cuda = torch.cuda.is_available()
    half = recipe.train.dtype == "bfloat16" or (
        recipe.train.dtype == "auto" and cuda and torch.cuda.is_bf16_supported()
    )
    trackers = list(recipe.trackers)

    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    accelerator = Accelerator(
        mixed_precision="bf16" if half else "no",
        cpu=not cuda,
        log_with=trackers or None,
        project_dir=recipe.output_dir,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),  # nothing writes to them
            InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.train.process_timeout)),
        ],
    )

    missing = set(trackers) - {"all"} - {str(tracker) for tracker in accelerator.log_with}
    if missing:
        place = recipe.origin.at(("trackers",))
        raise ConfigError(
            f"{place}: `trackers`: {', '.join(sorted(missing))} is not installed; "
            "install it or leave it out"
        )
    if trackers:
        settings = _flat(recipe.model_dump(mode="json"))
        accelerator.init_trackers(Path(recipe.output_dir).name, config=settings)
    return accelerator


def load_context(
    recipe: Recipe,
    objective: "Objective",
    task: Task | None,
    accelerator: "Accelerator",
    *,
    safe: bool = False,
) -> "RunContext":
    """Load the models, and resolve every `auto` that depends on them and on the machine."""
    from alignkit.data.template import given_template
    from alignkit.runs.context import RunContext
    from alignkit.runs.teacher import check_stored_teacher

    pair = _load_pair(recipe, objective, task, accelerator)
    is_measured = recipe.model.attention == "auto" and accelerator.device.type == "cuda"
    if is_measured and not objective.plan.outputs:
        _choose_attention(pair, accelerator)
    if recipe.data.chat_template is not None:  # it is saved with the model that learned it
        pair.tokenizer.chat_template = given_template(recipe.data)
    context = RunContext(recipe, objective, task, pair, accelerator, safe)
    check_stored_teacher(context)
    return replace(context, recipe=fill_autos(recipe, measured_autos(context)))


def _choose_attention(pair: "PolicyPair", accelerator: "Accelerator") -> None:
    """The fastest attention kernel, as the first process measures it."""
    from accelerate.utils import broadcast_object_list

    from alignkit.policies.attention import choose_kernel, set_kernel

    seconds = choose_kernel(pair)
    (chosen,) = broadcast_object_list([min(seconds, key=seconds.__getitem__, default=None)])
    if chosen is not None:
        set_kernel(pair, chosen)


def _load_pair(
    recipe: Recipe, objective: "Objective", task: Task | None, accelerator: "Accelerator"
) -> "PolicyPair":
    """The model with its anchors, or with the outputs that the plan asks for."""
    from alignkit.batches import FAMILIES
    from alignkit.policies.load import load_pair
    from alignkit.policies.load_scorer import load_scorer
    from alignkit.policies.sharding import make_shards
    from alignkit.runs.teacher import load_teacher

    plan = objective.plan
    model = recipe.model
    live = None
    if isinstance(task, LiveTask) and task.model is not None:
        live = (task.model, task.tokenizer)
    elif task is not None and model.name_or_path == "task":
        model = model.model_copy(update={"name_or_path": str(task.model_folder)})

    # Shards are there from the first byte; a live model, which is whole, is spread later.
    shards = None
    if recipe.train.shard and accelerator.num_processes > 1 and live is None and not plan.outputs:
        processes = accelerator.num_processes
        shards = make_shards(accelerator.device.type, processes, recipe.train)

    if plan.outputs:
        if live is not None:
            raise ConfigError(
                "model: reward and preference models get a new head on a loaded model; give the "
                "folder or the name of a language model"
            )
        if recipe.train.router_aux_loss not in ("auto", 0):
            raise ConfigError(
                f"train.router_aux_loss is {recipe.train.router_aux_loss}; reward and preference "
                "models are trained without the routers' loss: leave it at auto, or set 0"
            )
        return load_scorer(model, plan, device=accelerator.device, seed=recipe.train.seed)

    pair = load_pair(
        model,
        recipe.reference,
        recipe.target,
        plan,
        device=accelerator.device,
        fixed_data=not FAMILIES[plan.data].sampled and not plan.samples,
        seed=recipe.train.seed,
        live=live,
        router_aux_loss=recipe.train.router_aux_loss,
        # What a run samples is what it trains on; rows of a file come from no temperature.
        temperature=recipe.rollout.temperature if FAMILIES[plan.data].sampled else 1.0,
        shards=shards,
    )
    if plan.needs_teacher and recipe.teacher is not None:
        load_teacher(pair, recipe, task)
    return pair


def load_data(context: "RunContext") -> "JobData":
    """The rows or prompts that the plan learns from, as the loop takes them."""
    from alignkit.batches import FAMILIES
    from alignkit.objectives.streams import Streams
    from alignkit.runs.job_data import fixed_data, sampled_data
    from alignkit.runs.preference_data import preference_data
    from alignkit.runs.streams_data import streams_data

    if isinstance(context.objective, Streams):
        return streams_data(context, load_data)
    if context.plan.outputs:
        return preference_data(context)
    if FAMILIES[context.plan.data].sampled:
        return sampled_data(context)
    return fixed_data(context)


def build_job(
    context: "RunContext", data: "JobData", run: "RunFolder", *, notes: list[str]
) -> "Job":
    """Put together what the loop needs. `notes` are printed at the start, after the data report."""
    from alignkit.policies.tokenizer import vocabulary_hash
    from alignkit.runs.identity import hashes_of_inputs
    from alignkit.runs.model_card import model_card
    from alignkit.runs.user_code import callbacks, compute_metrics
    from alignkit.training.job import Job

    recipe = context.recipe
    # What must be the same when a checkpoint of this run is resumed.
    identity = {
        **identity_of(recipe),
        **data.identity,
        "tokenizer": vocabulary_hash(context.pair.tokenizer),
        **hashes_of_inputs(context),
    }
    return Job(
        context.objective,
        context.pair,
        data.source,
        recipe.train,
        run,
        context.accelerator,
        context.steps(data.rows),
        micro_batch_tokens=int(recipe.train.micro_batch_tokens),
        recipe=dump_recipe(recipe),
        identity=identity,
        evaluation=data.evaluation,
        measure=data.measure,
        observe=data.observe,
        samples=data.samples,
        card=model_card(recipe, context.objective, data.notes),
        callbacks=callbacks(context),
        compute_metrics=compute_metrics(context, data.evaluation is not None),
        notes=[*data.notes, *unused_by_all(recipe, context.objective), *notes],
    )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> scalar: what trackers can show."""
    if not isinstance(tree, dict):
        return {prefix: tree if isinstance(tree, int | float | str) else str(tree)}
    return {
        name: leaf
        for key, value in tree.items()
        for name, leaf in _flat(value, f"{prefix}.{key}".lstrip(".")).items()
    }
