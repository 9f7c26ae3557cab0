"""What a launch checks before any model is loaded. Importing this imports no torch."""

import os
from collections.abc import Collection
from glob import has_magic
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.config.data import DataConfig
from alignkit.config.objective_fields import known_names
from alignkit.config.recipe import Recipe
from alignkit.config.row_sources import RowSource
from alignkit.config.validation import nearest
from alignkit.data.file_formats import SUFFIXES, data_suffix
from alignkit.data.read import HeldOut, open_source, read_rows
from alignkit.data.template import given_template
from alignkit.errors import ConfigError
from alignkit.runs.live import PREFIX
from alignkit.runs.named import check_named
from alignkit.tasks import TASKS, Task

if TYPE_CHECKING:
    from alignkit.batches import Plan
    from alignkit.objectives.base import Objective


def check_without_torch(recipe: Recipe, safe: bool = False) -> None:
    """Check what needs no torch, which takes seconds to import: files, models and tasks that do not
    exist, and fields that `--safe` forbids. ConfigError, DataError or ModelError.
    """
    if safe and recipe.model.trust_remote_code:
        place = recipe.origin.at(("model", "trust_remote_code"))
        raise ConfigError(
            f"{place}: `model.trust_remote_code` would run code that comes with the model, "
            "and --safe forbids it"
        )

    for field, code in (
        ("callbacks", recipe.train.callbacks),
        ("compute_metrics", _named_code(recipe.train.compute_metrics)),
    ):
        if safe and code:
            place = recipe.origin.at(("train", field))
            raise ConfigError(
                f"{place}: `train.{field}` would run {code[0]}, code that the recipe names, and "
                "--safe forbids it"
            )
    if safe and recipe.rollout.takes_turns:
        field = "environment" if recipe.rollout.environment else "tools"
        place = recipe.origin.at(("rollout", field))
        raise ConfigError(
            f"{place}: `rollout.{field}` would run code that the recipe names, and --safe forbids it"
        )

    check_mesh(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    check_metric(recipe)
    _check_trackers(recipe)
    given_template(recipe.data)  # refuses a path that leads nowhere
    check_named(recipe, safe)
    _check_sources(recipe)
    _check_splits(recipe.data)


def _check_trackers(recipe: Recipe) -> None:
    """ConfigError for trackers whose package is not there."""
    missing = sorted(
        tracker
        for tracker in set(recipe.trackers) - {"all"}
        if not any(find_spec(name) for name in (tracker, f"{tracker}X"))  # tensorboardX is one too
    )
    if missing:
        place = recipe.origin.at(("trackers",))
        raise ConfigError(
            f"{place}: `trackers`: {', '.join(missing)} is not installed; install it or leave it out"
        )


def _named_code(spec: str | None) -> list[str]:
    """What `spec` names, unless it stands for a function that was given in Python."""
    return [] if spec is None or spec.startswith(PREFIX) else [spec]


def _check_splits(data: DataConfig) -> None:
    """Raises DataError for splits that do not exist, of sources whose splits somebody names and of
    saved sets, which say quickly which they have.
    """
    parts: list[tuple[RowSource, RowSource | HeldOut, str | None]] = [
        (source, source, source.split or data.split) for source in data.sources()
    ]
    for source in data.held_out_sources().values():
        parts.append((source, HeldOut(source), source.split or data.eval_split))

    for source, part, split in parts:
        name = source.source
        is_saved = (Path(name).expanduser() / "dataset_dict.json").is_file()
        named = split not in (None, "train") or is_saved
        if named and not name.startswith((PREFIX, "task:")):
            rows = open_source(data.reading(source), part).rows
            if data_suffix(Path(name)) == ".json":  # which knows its splits once it is read
                next(iter(rows), None)


def _check_sources(recipe: Recipe) -> None:
    """Files and tasks that the data section names and that do not exist."""
    data = recipe.data
    named = [("train", source.source) for source in data.sources()]
    named += [("eval", source.source) for source in data.held_out_sources().values()]

    for field, source in named:
        is_file_name = data_suffix(Path(source)) in SUFFIXES and not has_magic(source)
        if is_file_name and not Path(source).expanduser().exists():
            read_rows(data, source)  # raises, and names a file with a similar name

        name = source.removeprefix("task:")
        if name != source and name not in TASKS:
            place = recipe.origin.at(("data", field))
            raise ConfigError(
                f"{place}: `data.{field}`: there is no task `{name}`.{nearest(name, TASKS)} "
                f"Tasks: {', '.join(TASKS)}"
            )


def check_with_torch(recipe: Recipe, objective: "Objective", task: Task | None) -> None:
    """Check that the recipe brings what the objective's plan asks for, before models are loaded.
    ConfigError.
    """
    check_engine(recipe, objective)
    check_ahead(recipe, objective.plan)
    check_allocation(recipe, objective.plan)
    check_teacher(recipe, objective)
    check_growing_share(recipe, objective.plan)
    check_appraisal(recipe, objective, task)
    check_turns(recipe, objective, task)


def check_metric(recipe: Recipe, former: Collection[str] = ()) -> None:
    """Check that `train.metric` is of one of the held-out sets, where they have names, and of none
    that there is no more: `former` are the names in the run that is resumed. ConfigError.
    """
    metric = recipe.train.metric
    sets = recipe.data.held_out_sources()
    if metric == "auto" or not sets:
        return

    def is_of(names: Collection[str]) -> bool:
        return any(name and metric.startswith(f"eval_{name}_") for name in names)

    if is_of(sets) or ("" in sets and not is_of(former)):
        return
    there = (
        f"there are {', '.join(sets)}" if "" not in sets else "the held-out rows have no name now"
    )
    place = recipe.origin.at(("train", "metric"))
    way_out = f"take another metric, such as eval_{next(iter(sets))}_loss"
    if former:  # the metric may be that of the run, which it keeps
        place = recipe.output_dir
        way_out = "start without --resume in another output_dir"
    raise ConfigError(
        f"{place}: `train.metric` is `{metric}`, which is of no set of `data.eval`: {there}. Keep a set "
        f"of the name that the metric has, or {way_out}"
    )


def check_names(recipe: Recipe) -> None:
    """Check names for which code can register more, such as `divergence`, where the recipe names no
    code that could: for the command line, on which nothing was registered before. ConfigError.
    """
    section = recipe.objective
    if not isinstance(section, dict) or recipe.data.has_streams:
        return
    for field, (names, refused) in known_names(str(section.get("name"))).items():
        given = section.get(field)
        if isinstance(given, str) and given not in (*names, *refused):
            place = recipe.origin.at(("objective", field))
            raise ConfigError(
                f"{place}: `objective.{field}`: unknown {field} `{given}`.{nearest(given, names)} "
                f"Allowed: {', '.join(names)}"
            )


def check_mesh(recipe: Recipe, processes: int) -> None:
    """Check that the mesh holds all processes of a run. ConfigError."""
    mesh = recipe.train.mesh
    if mesh is None or processes == 1:  # one process goes on with what several began
        return
    try:
        mesh.shape(processes)
    except ConfigError as error:
        raise ConfigError(f"{recipe.origin.at(('train', 'mesh'))}: {error}") from error


def check_engine(recipe: Recipe, objective: "Objective") -> None:
    """Check that a vLLM server is asked only for what it can draw, and that its address and token
    are usable. ConfigError.
    """
    if recipe.rollout.engine == "hf" or not objective.plan.samples:
        return

    # These modules import torch, which a recipe without a server does not need yet.
    from alignkit.batches import FAMILIES
    from alignkit.rollout.client import Client
    from alignkit.rollout.vllm import check_draw

    try:
        for url in recipe.rollout.urls:
            Client(url, timeout=recipe.rollout.timeout)
        if not FAMILIES[objective.plan.data].sampled:
            raise ConfigError(
                "rollout.engine: vllm does not sample beside fixed data; use rollout.engine: hf"
            )
        for draw in objective.plan.samples:
            check_draw(draw)
    except ConfigError as error:
        raise ConfigError(f"{recipe.origin.at(('rollout', 'url'))}: {error}") from error


def check_ahead(recipe: Recipe, plan: "Plan") -> None:
    """Check that what is to be sampled ahead can be: the policy alone, as it was. ConfigError."""
    if not recipe.rollout.ahead or not plan.samples:
        return

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    reasons = {
        "extragradient steps sample twice": plan.update == "extragradient",
        "this objective draws from other models than the policy": any(
            list(draw.models) != ["policy"] or draw.once for draw in plan.samples
        ),
        "a sharded policy cannot be copied to sample from; use rollout.engine: vllm": (
            recipe.train.shard and recipe.rollout.engine == "hf" and processes > 1
        ),
        "several processes would replace each other's weights in their servers": (
            recipe.rollout.engine == "vllm" and processes > 1
        ),
    }

    for reason, holds in reasons.items():
        if holds:
            place = recipe.origin.at(("rollout", "ahead"))
            raise ConfigError(f"{place}: `rollout.ahead` does not work here: {reason}")


def check_allocation(recipe: Recipe, plan: "Plan") -> None:
    """Check that sample budgets are asked for by an objective that learns from scored samples of
    the policy alone. ConfigError.
    """
    if recipe.rollout.allocate is None or not plan.samples:
        return
    if plan.data == "rollout" and plan.feedback == "reward" and len(plan.samples) == 1:
        (draw,) = plan.samples
        if list(draw.models) == ["policy"] and draw.n is None and not plan.coupled:
            return
    place = recipe.origin.at(("rollout", "allocate"))
    raise ConfigError(
        f"{place}: `rollout.allocate` is for objectives that learn from scored samples of the policy, "
        "as many as rollout.completions says, such as raft or grpo: leave it out"
    )


def check_appraisal(recipe: Recipe, objective: "Objective", task: Task | None) -> None:
    """Check that an objective that learns from scores or verdicts gets them, from the recipe or
    from the task. ConfigError.
    """
    feedback = objective.plan.feedback
    if feedback == "none":
        return

    if feedback == "reward":
        needed = "`rewards`: set rewards.0.function=my_file.py:my_function"
        of_task = task is not None and (task.reward or task.environment) is not None
        # Whether an environment gives rewards is known once it has been imported.
        available = bool(recipe.rewards) or of_task or recipe.rollout.environment is not None
    else:
        needed = "`judge`: set judge.function=my_file.py:my_function"
        available = recipe.judge is not None or (task is not None and task.judge is not None)

    if not available:
        place = recipe.origin.at(("objective",))
        raise ConfigError(f"{place}: this objective needs {needed}")


def check_turns(recipe: Recipe, objective: "Objective", task: Task | None) -> None:
    """Check that episodes of several turns are asked for by an objective that can learn from them.
    ConfigError.
    """
    from alignkit.batches import FAMILIES

    plan = objective.plan
    of_task = task is not None and task.environment is not None
    if not FAMILIES[plan.data].sampled or not (recipe.rollout.takes_turns or of_task):
        return
    if plan.data != "rollout" or len(plan.samples) != 1:
        place = recipe.origin.at(("objective",))
        raise ConfigError(
            f"{place}: this objective compares answers with one another and cannot learn from "
            "episodes with an environment or tools; take one that learns from rewards, such as "
            "grpo or rpg"
        )
    if recipe.rollout.ahead:
        place = recipe.origin.at(("rollout", "ahead"))
        raise ConfigError(
            f"{place}: `rollout.ahead` samples single answers beside the training, and not yet "
            "episodes with an environment or tools: leave it out"
        )
    for number, reward in enumerate(recipe.rewards):
        if reward.credit == "to_go":
            place = recipe.origin.at(("rewards", str(number), "credit"))
            raise ConfigError(
                f"{place}: `credit: to_go` is for single answers; the rewards of an episode's turns "
                "come from its environment: leave it out"
            )
        if reward.rewriter is not None:
            place = recipe.origin.at(("rewards", str(number), "rewriter"))
            raise ConfigError(
                f"{place}: a rewriter reads single answers, and not episodes of several turns: leave "
                "it out"
            )
    if recipe.rollout.mask_truncated:
        place = recipe.origin.at(("rollout", "mask_truncated"))
        raise ConfigError(
            f"{place}: `rollout.mask_truncated` is for single answers; an episode that was cut has "
            "turns that were not: leave it out"
        )


def check_teacher(recipe: Recipe, objective: "Objective") -> None:
    """Check that an objective that learns from a teacher gets one, and that its most likely tokens
    are stored only where completions are known before training. ConfigError.
    """
    from alignkit.batches import FAMILIES

    plan = objective.plan
    if not plan.needs_teacher:
        return
    if recipe.teacher is None:
        place = recipe.origin.at(("objective",))
        raise ConfigError(
            f"{place}: this objective learns from a teacher; set teacher.name_or_path=MODEL, a "
            "model with the policy's tokenizer"
        )

    if recipe.teacher.top is None:
        return
    place = recipe.origin.at(("teacher", "top"))
    if FAMILIES[plan.data].sampled or plan.samples:
        raise ConfigError(
            f"{place}: `teacher.top` scores fixed completions once, before training, and this "
            "objective samples new ones; leave `top` and `store` out"
        )
    if plan.read_by_statistics != "teacher":
        raise ConfigError(
            f"{place}: `teacher.top` is for objectives that compare whole next-token laws with the "
            "teacher's; this one does not: leave `top` and `store` out"
        )


def check_growing_share(recipe: Recipe, plan: "Plan") -> None:
    """Check that a share of own answers which follows the held-out loss has one. ConfigError."""
    if not any(draw.adaptive.growth for draw in plan.samples):
        return
    if recipe.data.eval and recipe.train.eval_every:
        return
    field = ("data", "eval") if not recipe.data.eval else ("train", "eval_every")
    raise ConfigError(
        f"{recipe.origin.at(field)}: this objective's share of own answers grows with the held-out "
        f"loss (share_growth): set data.eval, and train.eval_every to a number of steps"
    )


def unused_sections(recipe: Recipe, objective: "Objective") -> list[str]:
    """One sentence for each section that is set although this objective does not look at it."""
    from alignkit.batches import FAMILIES

    plan = objective.plan
    unused = {
        # what is set -> whether nothing reads it
        "rewards": bool(recipe.rewards) and plan.feedback != "reward",
        "judge": recipe.judge is not None and plan.feedback in ("none", "reward"),
        "rollout.url": recipe.rollout.url is not None and not plan.samples,
        "rollout.ahead": recipe.rollout.ahead > 0 and not FAMILIES[plan.data].sampled,
        "rollout.pass_rate": recipe.rollout.pass_rate is not None and plan.feedback != "reward",
        "rollout.mask_truncated": recipe.rollout.mask_truncated and plan.data != "rollout",
        "target": recipe.target is not None and "target" not in plan.anchors,
        "teacher": recipe.teacher is not None and not plan.needs_teacher,
        "rollout.environment": recipe.rollout.takes_turns and plan.data != "rollout",
    }
    return [
        f"`{section}` is set in the recipe, but this objective does not use it"
        for section, is_unused in unused.items()
        if is_unused
    ]
