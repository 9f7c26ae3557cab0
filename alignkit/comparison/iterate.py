"""`alignkit iterate`: rounds of training, each from the model that the round before ended with.

    from alignkit.config.recipe import load_recipe
    from alignkit.comparison.iterate import iterate
    iterate(load_recipe("iterative_dpo"))

The recipe's output_dir holds `round-K` (ordinary run folders), `pairs/round-K.jsonl` where the rounds
make their own, `student-K` where a student learns from them, `eval.json` and `report.html`. The same call goes on where an interrupted one stopped:
a finished round is not trained again, a started one goes on from its newest checkpoint, and more rounds
follow those that there are. Rounds are runs of a comparison (`run_state`), tied to the content of what
they were made from; the report is that of `alignkit eval`.
"""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from alignkit.comparison.compare import model_on_disk, stoppable, with_inputs
from alignkit.comparison.folder import check_folder, mark_folder
from alignkit.comparison.grid import Point
from alignkit.comparison.run_state import folder_of, read_run_state, stale_runs
from alignkit.comparison.single_run import train_point
from alignkit.comparison.student import check_student, student_before, student_run
from alignkit.config.escaping import plain
from alignkit.config.iterate import IterateConfig
from alignkit.config.objective import build_objective
from alignkit.config.recipe import REFERENCES, Recipe, dump_recipe
from alignkit.config.streams import refuse_streams
from alignkit.errors import CheckpointError, ConfigError, ResourceError
from alignkit.evaluation.request import Request, anchor_of
from alignkit.files import write_json, write_text, writing
from alignkit.runs.checks import check_appraisal, check_without_torch
from alignkit.runs.inputs import changed_inputs, inputs_of
from alignkit.runs.launch import resolve_task
from alignkit.training.identity import differences_between

if TYPE_CHECKING:
    from alignkit.objectives.base import Objective

FOLLOWING = ("ema", "synced")  # references that move with the policy
STRIDE = 1000  # between the seeds of two rounds


def section_of(recipe: Recipe) -> IterateConfig:
    """The recipe's `iterate` section, or its defaults."""
    return recipe.iterate or IterateConfig()


def iterate(
    recipe: Recipe, *, safe: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Train what is missing of the recipe's rounds, measure them all, and write the report.

    Returns what `eval.json` holds. `safe` refuses code that the recipe brings.

    Raises ConfigError before anything is trained where the recipe cannot be iterated, CheckpointError
    where a finished round was made from something else than there is today, ResourceError where the
    disk refuses, Interrupted on SIGINT and SIGTERM after a checkpoint, and what training raises.
    """
    console = console or Console(stderr=True)
    check_iterable(recipe, safe)
    folder = Path(recipe.output_dir).expanduser()
    check_folder(folder, "iteration")
    if find_spec("matplotlib") is None:
        raise ResourceError("the report's picture needs matplotlib: pip install 'alignkit[eval]'")

    # From here on torch is needed.
    from alignkit.training.run_folder import RunFolder

    objective = build_objective(recipe.objective, recipe.origin, safe=safe)
    _check_objective(recipe, objective)
    points = rounds_of(recipe)
    with RunFolder(recipe.output_dir), stoppable(points):
        check_folder(folder, "iteration")  # once more, now that no other process can write to it
        for point in points:
            _check_pairs(recipe, point)
            for run, of in _runs_of(recipe, point, objective):
                _check_run(recipe, run, of)
        mark_folder(folder, "iteration")
        with writing(folder / "recipe.yaml"):
            write_text(folder / "recipe.yaml", dump_recipe(recipe))

        for point in points:
            _train_round(recipe, point, objective, safe, console)
        return _report(recipe, points, safe)


def check_iterable(recipe: Recipe, safe: bool = False) -> None:
    """Refuse, before torch is imported, a recipe whose rounds could not follow one another.

    ConfigError.
    """
    refuse_streams(recipe, "iterate")
    check_without_torch(recipe, safe)
    section = section_of(recipe)
    data = recipe.data
    kind = recipe.reference.kind

    if section.reference == "previous" and kind not in REFERENCES:
        raise ConfigError(
            f"{recipe.origin.at(('reference', 'kind'))}: `reference.kind` is the model {kind}, and "
            "`iterate.reference: previous` asks for the one of the round before; leave one of them out"
        )
    if section.reference == "first" and kind in FOLLOWING:
        raise ConfigError(
            f"{recipe.origin.at(('reference', 'kind'))}: a reference of kind {kind} begins where each "
            "round does, so set iterate.reference=previous"
        )
    if section.reference == "first" and recipe.model.add_tokens:
        raise ConfigError(
            f"{recipe.origin.at(('model', 'add_tokens'))}: the first model has no embeddings of "
            "`model.add_tokens`, so later rounds cannot have it as their reference; set "
            "iterate.reference=previous"
        )
    if section.pairs and data.columns:
        raise ConfigError(
            f"{recipe.origin.at(('data', 'columns'))}: with `iterate.pairs` the rows are alignkit's "
            "own; give prompts in a column `prompt`, and leave `data.columns` out"
        )
    if section.pairs and section.pairs.prompts is None and not isinstance(data.train, str):
        raise ConfigError(
            f"{recipe.origin.at(('data', 'train'))}: `data.train` is a list; name the prompts of the "
            "pairs with iterate.pairs.prompts=FILE"
        )
    check_student(recipe, safe)
    if not (section.prompts or data.eval or _task_named(recipe)):
        raise ConfigError(
            f"{recipe.origin.name}: nothing says which prompts the report measures on; set "
            "iterate.prompts=FILE (rows with `prompt`)"
        )


def _check_objective(recipe: Recipe, objective: "Objective") -> None:
    """ConfigError for objectives that leave no policy, or that no pairs can be made for."""
    from alignkit.batches import FAMILIES

    place = recipe.origin.at(("objective",))
    if objective.plan.outputs:
        raise ConfigError(
            f"{place}: a reward or preference model writes nothing, so no round can begin with it; "
            "take an objective that trains a policy"
        )
    if section_of(recipe).pairs and FAMILIES[objective.plan.data].sampled:
        raise ConfigError(
            f"{place}: this objective samples from the policy itself; leave `iterate.pairs` out, or "
            "take one that learns from pairs, such as dpo"
        )
    check_appraisal(recipe, objective, resolve_task(recipe))


def _task_named(recipe: Recipe) -> str | None:
    """The `task:NAME` that gives prompts to measure on, if there is one."""
    pairs = section_of(recipe).pairs
    prompts = pairs.prompts if pairs else None
    if prompts and prompts.startswith("task:"):
        return prompts
    return recipe.data.task_source()


def rounds_of(recipe: Recipe) -> list[Point]:
    """The runs of the rounds. The first is the recipe's own; each later one begins with the model of
    the one before, under a seed of its own.
    """
    section = section_of(recipe)
    out = Path(recipe.output_dir).expanduser()
    first = _model_name(recipe)
    # A task's models by their folders: rounds on pairs read files, which name no task any more.
    recipe = _models_on_disk(recipe) if section.pairs else recipe
    points = []
    for number in range(1, section.rounds + 1):
        name = f"round-{number}"
        seed = recipe.train.seed + STRIDE * (number - 1)
        changes: dict[str, Any] = {
            "compare": None,
            "iterate": None,
            "train": recipe.train.model_copy(update={"seed": seed}),
            "output_dir": str(out / name),
        }
        if section.pairs:
            file = out / "pairs" / f"{name}.jsonl"
            own = {"train": str(file), "format": "pair", "split": "train", "subset": None}
            changes["data"] = recipe.data.model_copy(update=own)
            # Without the task among its data, a recipe's `task` would stand for the default one's model.
            changes["model"] = model_on_disk(recipe)
        if number > 1:
            begin = out / f"round-{number - 1}" / "model"
            changes |= _later(recipe, str(begin), first, section)
        round_recipe = recipe.model_copy(update=changes)
        round_recipe._origin = recipe.origin
        points.append(Point(name, "round", {"round": number}, seed, round_recipe))
    return points


def _models_on_disk(recipe: Recipe) -> Recipe:
    """The recipe with a task's model and teacher named by their folders."""
    changes: dict[str, Any] = {"model": model_on_disk(recipe)}
    teacher = recipe.teacher
    if teacher and teacher.name_or_path == "task" and (task := resolve_task(recipe)):
        folder = {"name_or_path": str(task.teacher_folder)}
        changes["teacher"] = teacher.model_copy(update=folder)
    on_disk = recipe.model_copy(update=changes)
    on_disk._origin = recipe.origin
    return on_disk


def _later(recipe: Recipe, begin: str, first: str, section: IterateConfig) -> dict[str, Any]:
    """What is different from the second round on: where it begins, and what it is anchored to."""
    # An adapter's folder brings its adapter along, and new tokens are there already.
    moved: dict[str, Any] = {
        "name_or_path": begin,
        "revision": None,
        "adapter": None,
        "add_tokens": [],
    }
    changes: dict[str, Any] = {"model": recipe.model.model_copy(update=moved)}
    if section.reference == "first" and recipe.reference.kind in REFERENCES:
        changes["reference"] = recipe.reference.model_copy(update={"kind": first})
    return changes


def _model_name(recipe: Recipe) -> str:
    """The model that the rounds begin with, as a folder or a name of the hub."""
    adapter = recipe.model.adapter
    if adapter and adapter.path:
        return adapter.path
    return str(model_on_disk(recipe).name_or_path)


def _train_round(
    recipe: Recipe, point: Point, objective: "Objective", safe: bool, console: Console
) -> None:
    """Make the round's pairs and train on them, as far as that is not done yet."""
    if section_of(recipe).pairs:
        _make_pairs(recipe, point, safe, console)

    for run, of in _runs_of(recipe, point, objective):
        # Its model and rows exist only now.
        run = _check_run(recipe, run, of)
        if read_run_state(run).status == "finished":
            console.print(f"{run.name} is finished and not repeated", highlight=False)
            continue
        console.print(f"{run.name}: training", highlight=False)
        train_point(run, safe)


def _runs_of(
    recipe: Recipe, point: Point, objective: "Objective"
) -> list[tuple[Point, "Objective"]]:
    """The round's own run, and the one in which a student learns its labels, each with what it
    trains.
    """
    runs = [(point, objective)]
    student = student_run(recipe, point)
    if student is not None:
        runs.append((student, build_objective(student.recipe.objective, student.recipe.origin)))
    return runs


def _check_run(recipe: Recipe, point: Point, objective: "Objective") -> Point:
    """The point with its inputs. CheckpointError or ConfigError where its folder holds what was made
    from others.
    """
    point = with_inputs(point, objective)
    for name, reason in stale_runs([point]).items():
        raise CheckpointError(
            f"{name} in {recipe.output_dir} was made from something else ({reason}): undo the "
            "change, or delete its folder, its pairs and those of later rounds to train them again"
        )
    return point


def _make_pairs(recipe: Recipe, point: Point, safe: bool, console: Console) -> None:
    """Sample, score and label by the model that the round begins with, unless it is done."""
    from alignkit.runs.pairs import PairRequest, make_pairs

    section = section_of(recipe).pairs
    assert section is not None
    _check_pairs(recipe, point)
    file = Path(str(point.recipe.data.train))
    if file.exists():
        return

    record = file.with_suffix(".json")
    with writing(record):
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, _origin_of_pairs(recipe, point))  # first: pairs never stand without it

    request = PairRequest(
        model=_model_name(point.recipe),
        prompts=_prompts_of(recipe),
        reward=recipe.rewards,
        method=section.method,
        samples=section.samples,
        pairs=section.per_prompt,
        label_temperature=section.label_temperature,
        beta=section.beta_of(int(point.swept["round"])),
        max_new_tokens=recipe.rollout.max_new_tokens,
        temperature=section.temperature,
        seed=point.seed,
        safe=safe,
        student=student_before(recipe, int(point.swept["round"])),
    )
    counts = make_pairs(request, file)
    listed = ", ".join(f"{count} {name}" for name, count in counts.items())
    console.print(plain(f"{point.name}: {listed}"), highlight=False, soft_wrap=True)


def _prompts_of(recipe: Recipe) -> str:
    """Where the prompts of the pairs are."""
    pairs = section_of(recipe).pairs
    return (pairs and pairs.prompts) or str(recipe.data.train)


def _origin_of_pairs(recipe: Recipe, point: Point) -> dict[str, Any]:
    """What decides the pairs of a round: its settings, and hashes of the model, prompts and code."""
    section = section_of(recipe).pairs
    assert section is not None
    number = int(point.swept["round"])
    pairs = section.model_dump(mode="json")
    beta = section.beta_of(number)
    student = section.student and {"model": student_before(recipe, number)}
    made = {**pairs, "prompts": _prompts_of(recipe), "beta": [beta], "student": student}
    settings = {
        "model": {"name_or_path": _model_name(point.recipe)},
        "rewards": [reward.model_dump(mode="json") for reward in recipe.rewards],
        "rollout": {"max_new_tokens": recipe.rollout.max_new_tokens},
        "iterate": {"pairs": made},
        "train": {"seed": point.seed},
    }
    return {"settings": settings, "inputs": inputs_of(settings)}


def _check_pairs(recipe: Recipe, point: Point) -> None:
    """Refuse pairs that were made from something else than today's recipe would make them from.

    ConfigError for another recipe, CheckpointError for another content of what it names.
    """
    file = Path(str(point.recipe.data.train))
    if not section_of(recipe).pairs or not file.exists():
        return
    record = file.with_suffix(".json")
    now = _origin_of_pairs(recipe, point)
    try:
        before = json.loads(record.read_bytes())
    except FileNotFoundError:  # a user's own pairs
        return
    except ValueError:
        raise CheckpointError(f"{record} cannot be read; delete it and its pairs") from None

    settings = differences_between(before["settings"], now["settings"])
    changes = [*settings, *changed_inputs(before["inputs"], now["inputs"])]
    if not changes:
        return
    words = (
        f"{file} was made from something else ({'; '.join(changes)}): undo "
        "the change, delete the pairs and rounds from there on, or choose another output_dir"
    )
    raise ConfigError(words) if settings else CheckpointError(words)


def _report(recipe: Recipe, points: Sequence[Point], safe: bool) -> dict[str, Any]:
    """Measure all rounds against the model that they began with, and write what was measured."""
    from alignkit.evaluation.evaluate import evaluate, write_results

    section = section_of(recipe)
    task = None if recipe.data.eval else _task_named(recipe)
    request = Request(
        [str(folder_of(point)) for point in points],
        reference=anchor_of(recipe),
        prompts=section.prompts or task,
        samples=section.samples,
        seed=recipe.train.seed,
        safe=safe,
    )
    results = evaluate(request)
    for point, model in zip(points, results["models"]):
        state = read_run_state(point)
        model["round"] = {"of": str(recipe.output_dir), "share": point.swept["round"]}
        model["cpu_seconds"] = state.cpu_seconds
    folder = Path(recipe.output_dir).expanduser()
    write_results(results, folder / "eval.json", folder / "report.html")
    return results
