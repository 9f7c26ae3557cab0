"""What a run remembers of its recipe: every `auto` as it was resolved, and the fields that tell one
run from another.
"""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.config.recipe import Recipe, load_recipe
from alignkit.config.train import known_goal
from alignkit.errors import AlignkitError, CheckpointError, DataError
from alignkit.files import MANIFEST
from alignkit.runs.checks import check_metric
from alignkit.runs.streams import contexts_of, held_out_metric
from alignkit.training import checkpoint
from alignkit.training.identity import compare, differences_between
from alignkit.training.run_folder import RunFolder

if TYPE_CHECKING:
    from alignkit.runs.context import RunContext

# Fields that may change between a checkpoint and its resumption: they decide where, how fast and
# how often, but not what is trained.
FREE: dict[str, set[str] | None] = {  # None: the whole section
    "model": {"layout", "gradient_checkpointing", "save_dtype"},
    "reference": {"store"},
    "teacher": {"store"},
    # what is trained on is compared row by row
    "data": {
        "train",
        "eval",
        "eval_split",
        "eval_subset",
        "format",
        "truncate",
        "template_time",
        "workers",
    },
    "train": {
        "micro_batch_tokens",
        "eval_every",
        "save_every",
        "log_samples_every",
        "keep",
        "shard",
        "mesh",
        "offload",
        "max_skipped_steps",
        "process_timeout",
        "callbacks",
        "compute_metrics",
    },
    "rollout": {
        "url",
        "colocate",
        "program",
        "weights_dir",
        "transfer",
        "start_timeout",
        "timeout",
        "max_mismatch",
    },
    "compare": None,
    "iterate": None,
    "trackers": None,
    "hub": None,
    "output_dir": None,
}

# Fields whose `auto` is resolved once and then stays with the run. `data.append_eos` is not among
# them: it decides for each row.
AUTOS = [
    ("model", "dtype"),
    ("model", "attention"),
    ("model", "layout"),
    ("model", "save_dtype"),
    ("reference", "kind"),
    ("data", "format"),
    ("data", "template_time"),
    ("train", "micro_batch_tokens"),
    ("train", "dtype"),
    ("train", "router_aux_loss"),
    ("train", "metric"),
    ("train", "metric_goal"),
]


def check_output(recipe: Recipe, resume: str | None) -> None:
    """Check, without torch, that the run may write to its output_dir, and that the checkpoint that is
    to be resumed is there. ConfigError or CheckpointError.
    """
    run = RunFolder(recipe.output_dir)
    stores = [recipe.reference.store, recipe.teacher and recipe.teacher.store]
    run.refuse_foreign_files([store for store in stores if store])
    if resume is None:  # the loop asks again once it holds the run's lock
        run.refuse_results()
    elif resume != "auto" and not Path(resume).expanduser().is_dir():
        raise CheckpointError(
            f"there is no checkpoint folder {resume}; `alignkit checkpoint list RUN` names those of a run"
        )


def with_resolved_autos(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with each `auto` replaced by what the run in its output_dir resolved it to, and a
    sentence about every other difference from that run's recipe. ConfigError where the run's metric
    is of held-out rows that there are no more.
    """
    file = Path(recipe.output_dir).expanduser() / "recipe.yaml"
    if not file.is_file():
        return recipe, []

    before = load_recipe(file)
    if not before.data.held_out_sources():  # nothing was measured yet
        train = before.train.model_copy(update={"metric": "auto", "metric_goal": "auto"})
        before = before.model_copy(update={"train": train})
    recipe = fill_autos(recipe, before.model_dump())
    check_metric(recipe, before.data.held_out_sources())
    changes = compare(before.model_dump(mode="json"), recipe.model_dump(mode="json"))
    return recipe, [f"changed since this run began: {'; '.join(changes)}"] if changes else []


def check_recorded_recipe(recipe: Recipe, resume: str) -> None:
    """CheckpointError where the run in output_dir was made with another recipe: a difference is
    named before models and data are loaded for it, which may fail in ways that do not say so.
    """
    run = RunFolder(recipe.output_dir)
    if (run.path / "recipe.yaml").is_file():  # without it no `auto` is known yet
        run.refuse_another_recipe(resume, identity_of(recipe))


def told_apart(error: DataError, recipe: Recipe) -> AlignkitError:
    """`error`, from loading the data of a run that is to be resumed, as what the user has to know
    first: that the run in output_dir was trained on other data.
    """
    run = RunFolder(recipe.output_dir)
    file = run.path / "recipe.yaml"
    if not file.is_file() or not (run.finished or checkpoint.steps(run.checkpoints)):
        return error

    before = load_recipe(file).data.model_dump(mode="json")
    changes = compare(before, recipe.data.model_dump(mode="json"), "data.")
    if not changes:
        return DataError(f"{error}\n{run.path} was trained on other rows of this name")
    return CheckpointError(
        f"{run.path} belongs to another run: {'; '.join(changes)}. Undo the change, or start without "
        f"--resume in another output_dir. The data given now could not be used either: {error}"
    )


def check_unsigned_result(recipe: Recipe) -> None:
    """CheckpointError where the finished run in output_dir, of a version that recorded nothing in
    its model/, has another recipe. A run with checkpoints is compared with those.
    """
    run = RunFolder(recipe.output_dir)
    is_signed = (run.model / MANIFEST).exists() or checkpoint.steps(run.checkpoints)
    file = run.path / "recipe.yaml"
    if not run.finished or is_signed or not file.is_file():
        return

    changes = differences_between(identity_of(load_recipe(file)), identity_of(recipe))
    if changes:
        raise CheckpointError(
            f"{run.path} is finished and the result of another run: {'; '.join(changes)}. Undo the "
            "change, or choose another output_dir"
        )


def measured_autos(context: "RunContext") -> dict[str, dict[str, Any]]:
    """Section -> field -> what its `auto` turned out to be on this machine and with this model."""
    from alignkit.policies.packing import default_budget, kernel_of

    pair = context.pair
    accelerator = context.accelerator
    with pair.model("policy") as model:
        attention = kernel_of(model.config)
    dtype = str(pair.parameters()[0].dtype).removeprefix("torch.")
    router = getattr(getattr(pair, "base", None), "router", None)  # reward models have none
    metric = context.recipe.train.metric
    if metric == "auto":
        metric = _first_metric(context)

    return {
        "model": {
            "dtype": dtype,
            "attention": attention,
            "layout": pair.layout,
            "save_dtype": str(pair.save_dtype or dtype).removeprefix("torch."),
        },
        "data": {"template_time": _start_time()},
        "reference": {"kind": "auto" if pair.reference_kind == "none" else pair.reference_kind},
        "train": {
            "dtype": "bfloat16" if accelerator.mixed_precision == "bf16" else "float32",
            "micro_batch_tokens": default_budget(accelerator.device, pair.packing),
            "router_aux_loss": 0.0 if router is None else router.coefficient,
            "metric": metric,
            "metric_goal": context.recipe.train.goal_of(metric),
        },
    }


def _first_metric(context: "RunContext") -> str:
    """What is watched of the first held-out set: of streams, those of the first that has one."""
    measured = next(
        (part for part in contexts_of(context) if part.recipe.data.held_out_sources()), context
    )
    metric = held_out_metric(measured)
    first = next(iter(context.recipe.data.held_out_sources()), "")
    return f"eval_{first}_{metric}" if first else f"eval_{metric}"


def _start_time() -> str:
    """This minute by the first process's clock, so that all processes render the same text."""
    from accelerate.utils import broadcast_object_list

    now = [datetime.now().isoformat(timespec="minutes")]
    return str(broadcast_object_list(now)[0])


def fill_autos(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with each `auto` replaced for which `values`
    (section -> field -> value) has a value.
    """
    sections: dict[str, dict[str, Any]] = {}
    for section, field in AUTOS:
        is_auto = getattr(getattr(recipe, section), field) == "auto"
        if is_auto and field in values.get(section, {}):
            sections.setdefault(section, {})[field] = values[section][field]

    return recipe.model_copy(
        update={
            section: getattr(recipe, section).model_copy(update=fields)
            for section, fields in sections.items()
        }
    )


def identity_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what may change between a checkpoint and its resumption."""
    free_sections = {section for section, fields in FREE.items() if fields is None}
    if recipe.teacher is None:  # older checkpoints have no such section
        free_sections.add("teacher")
    identity = recipe.model_dump(mode="json", exclude=free_sections)
    for section, fields in FREE.items():
        for field in fields or ():
            if section in identity:
                del identity[section][field]

    # A field that older checkpoints do not have is left out where it changes nothing.
    if recipe.train.metric_goal in ("auto", known_goal(recipe.train.metric)):
        del identity["train"]["metric_goal"]
    if recipe.train.router_aux_loss in ("auto", 0):
        del identity["train"]["router_aux_loss"]

    # Nothing is measured: rows that are held out from a resumption on may have another metric.
    if not recipe.data.held_out_sources():
        identity["train"].pop("metric_goal", None)
        del identity["train"]["metric"]
    return identity
