"""From a recipe to a finished run: check it, load data and models, resolve every `auto`, and hand a
job to the loop.
"""

import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.config.objective import build_objective
from alignkit.config.recipe import Recipe, dump_recipe
from alignkit.config.validation import nearest
from alignkit.distributed.launcher import end
from alignkit.errors import ConfigError
from alignkit.runs.resume import found_autos, identity_of, replaced, with_resolved_autos

if TYPE_CHECKING:
    from accelerate import Accelerator

    from alignkit.batches import Plan
    from alignkit.objectives.base import Objective
    from alignkit.policies.pair import PolicyPair
    from alignkit.tasks import Task
    from alignkit.training.loop import Job, Result
    from alignkit.training.run_folder import RunFolder

DEFAULT_TASK = "reviews"


def run_recipe(recipe: Recipe, resume: str | None = None, *, safe: bool = False) -> "Result":
    """Run a recipe to its end in this process. `resume` is None, "auto" or a checkpoint folder.

    `safe` refuses everything by which a recipe could run code of its own. Errors carry their exit
    code (alignkit.errors).
    """
    check_without_torch(recipe, safe)
    from alignkit.distributed.errors import raise_on_all_ranks
    from alignkit.training.loop import train
    from alignkit.training.run_folder import RunFolder

    objective = build_objective(recipe.objective, recipe.origin, safe=safe)
    changes: list[str] = []
    if resume is None:
        RunFolder(
            recipe.output_dir
        ).refuse_to_overwrite()  # before anything is loaded; the loop asks again under the lock
    else:
        recipe, changes = with_resolved_autos(recipe)
    check_engine(recipe, objective)
    task = resolve_task(recipe)
    check_appraisal(recipe, objective, task)
    accelerator = make_accelerator(recipe)
    run = RunFolder(recipe.output_dir, writes=accelerator.is_main_process)
    try:
        job = build_job(recipe, objective, task, accelerator, run, safe=safe)
        job.notes = [*job.notes, *changes]
        with ExitStack() as stack:
            with raise_on_all_ranks(accelerator):  # the first process alone takes the run's lock
                stack.enter_context(run)
            return train(job, resume)
    finally:
        end(accelerator)


def check_without_torch(recipe: Recipe, safe: bool = False) -> None:
    """What can be refused before the seconds that importing torch takes: files and tasks that are
    not there, unsafe fields.
    """
    if safe and recipe.model.trust_remote_code:
        place = recipe.origin.at(("model", "trust_remote_code"))
        raise ConfigError(
            f"{place}: `model.trust_remote_code` would run code that comes with the model, and --safe forbids it"
        )
    from alignkit.data.read import SUFFIXES, read_rows
    from alignkit.tasks import TASKS

    for field in ("train", "eval"):
        source = getattr(recipe.data, field) or ""
        if Path(source).suffix in SUFFIXES and not Path(source).expanduser().exists():
            read_rows(recipe.data, source)  # raises, with a name that is nearly it
        name = source.removeprefix("task:")
        if name != source and name not in TASKS:
            place = recipe.origin.at(("data", field))
            raise ConfigError(
                f"{place}: `data.{field}`: there is no task `{name}`.{nearest(name, TASKS)} Tasks: {', '.join(TASKS)}"
            )


def resolve_task(recipe: Recipe) -> "Task | None":
    """The embedded world that the model or the data name, made on first use; None where neither
    does.
    """
    sources = [
        source
        for source in (recipe.data.train, recipe.data.eval)
        if source and source.startswith("task:")
    ]
    if len(set(sources)) > 1:
        raise ConfigError(
            f"{recipe.origin.at(('data', 'eval'))}: `data.train` and `data.eval` name two tasks: {', '.join(sources)}"
        )
    if not sources and recipe.model.name_or_path != "task":
        return None
    from alignkit.tasks import resolve

    return resolve(sources[0] if sources else DEFAULT_TASK)


def check_engine(recipe: Recipe, objective: "Objective") -> None:
    """A vLLM server is asked only for what it can draw, and only with its token."""
    if recipe.rollout.engine == "hf" or not objective.plan.samples:
        return
    from alignkit.rollout.client import Client
    from alignkit.rollout.vllm import check_draw

    assert recipe.rollout.url is not None
    try:
        Client(recipe.rollout.url, timeout=recipe.rollout.timeout)
        if objective.plan.data not in ("rollout", "game"):
            raise ConfigError(
                "rollout.engine: vllm does not sample beside fixed data; use rollout.engine: hf"
            )
        for draw in objective.plan.samples:
            check_draw(draw)
    except ConfigError as error:
        raise ConfigError(f"{recipe.origin.at(('rollout', 'url'))}: {error}") from error


def check_appraisal(recipe: Recipe, objective: "Objective", task: "Task | None") -> None:
    """An objective that learns from scores or verdicts has to get them from somewhere."""
    feedback = objective.plan.feedback
    field, example = (
        ("rewards", "rewards.0.function") if feedback == "reward" else ("judge", "judge.function")
    )
    brought = task is not None and getattr(task, field.removesuffix("s")) is not None
    if feedback != "none" and not getattr(recipe, field) and not brought:
        raise ConfigError(
            f"{recipe.origin.at(('objective',))}: this objective needs `{field}`: set {example}=my_file.py:my_function"
        )


def _unused(recipe: Recipe, objective: "Objective") -> list[str]:
    """Sections that are set and that this objective does not look at."""
    plan = objective.plan
    unused = {
        "rewards": bool(recipe.rewards) and plan.feedback != "reward",
        "judge": recipe.judge is not None and plan.feedback in ("none", "reward"),
        "rollout.url": recipe.rollout.url is not None and not plan.samples,
        "rollout.pass_rate": recipe.rollout.pass_rate is not None and plan.feedback != "reward",
        "target": recipe.target is not None and "target" not in plan.anchors,
    }
    return [
        f"`{section}` is set in the recipe, but this objective does not use it"
        for section, holds in unused.items()
        if holds
    ]


def make_accelerator(recipe: Recipe) -> "Accelerator":
    """accelerate's handle on devices, processes, precision and trackers. It accumulates nothing:
    the reduction does.
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
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    trackers = list(recipe.trackers)
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
            f"{place}: `trackers`: {', '.join(sorted(missing))} is not installed; install it or leave it out"
        )
    if trackers:
        accelerator.init_trackers(
            Path(recipe.output_dir).name, config=_flat(recipe.model_dump(mode="json"))
        )
    return accelerator


def build_job(
    recipe: Recipe,
    objective: "Objective",
    task: "Task | None",
    accelerator: "Accelerator",
    run: "RunFolder",
    *,
    safe: bool = False,
) -> "Job":
    """Load models and data, resolve every `auto`, and put together what the loop needs."""
    from alignkit.policies.load import vocabulary_hash
    from alignkit.runs.job_data import fixed_feed, sampled_feed
    from alignkit.runs.model_card import model_card
    from alignkit.runs.preference_data import preference_feed
    from alignkit.training.loop import Job

    plan = objective.plan
    fixed = plan.data not in ("rollout", "game")
    pair = _load(recipe, plan, task, accelerator)
    recipe = replaced(recipe, found_autos(pair, accelerator, fixed))
    make_feed = preference_feed if plan.outputs else fixed_feed if fixed else sampled_feed
    feed = make_feed(recipe, objective, task, pair, accelerator, safe)
    recipe = replaced(recipe, {"data": {"format": feed.format}})
    steps = recipe.train.steps
    if recipe.train.epochs is not None:
        steps = math.ceil(recipe.train.epochs * feed.rows / recipe.train.batch_size) * plan.epochs
    return Job(
        objective,
        pair,
        feed.source,
        recipe.train,
        run,
        accelerator,
        steps or 0,
        micro_batch_tokens=int(recipe.train.micro_batch_tokens),
        recipe=dump_recipe(recipe),
        identity={
            **identity_of(recipe),
            **feed.identity,
            "tokenizer": vocabulary_hash(pair.tokenizer),
        },
        evaluation=feed.evaluation,
        measure=feed.measure,
        samples=feed.samples,
        card=model_card(recipe, objective, feed.notes),
        notes=[*feed.notes, *_unused(recipe, objective)],
    )


def _load(
    recipe: Recipe, plan: "Plan", task: "Task | None", accelerator: "Accelerator"
) -> "PolicyPair":
    """The model with what anchors it, or with the outputs that the plan asks for."""
    from alignkit.policies.load import load_pair, load_scorer

    model = recipe.model
    device = accelerator.device
    seed = recipe.train.seed
    if task is not None and model.name_or_path == "task":
        model = model.model_copy(update={"name_or_path": str(task.model_folder)})
    if plan.outputs:
        return load_scorer(model, plan, device=device, seed=seed)
    fixed = plan.data not in ("rollout", "game") and not plan.samples
    return load_pair(
        model, recipe.reference, recipe.target, plan, device=device, fixed_data=fixed, seed=seed
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
