"""Runs a grid of objectives, measures every result alike and writes one report.

    from alignkit.config.recipe import load_recipe
    from alignkit.comparison.compare import compare
    compare(load_recipe("compare"))

The way through this folder: `grid` makes the runs from the recipe, `run_pool` spreads them over
processes, `single_run` trains one and `measure_run` measures it, `matching` asks for more runs
where `compare.match_kl` names KLs, `results` gathers what was measured, `report` writes it down.

The recipe's output_dir holds `runs/NAME` (ordinary run folders), `reference` (the one reference
pass), `decoders`, `base.json`, `results.json`, `report.md`, `report.html` and the pictures. The same call goes
on where an interrupted one stopped. Every run is tied to the content of the models, rows and code
it was made from (`run_state`); where that has changed since, the run is named and left out.
"""

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from alignkit.comparison.decoders import expand_decoders, measure_decoders
from alignkit.comparison.folder import check_folder, mark_folder
from alignkit.comparison.grid import Point, expand, section_of
from alignkit.comparison.live_table import LiveTable
from alignkit.comparison.matching import Search
from alignkit.comparison.run_state import read_run_state, stale_runs, unchecked_runs
from alignkit.comparison.single_run import LOG, measurer_of, record_failure, train_and_measure
from alignkit.config.escaping import plain
from alignkit.config.objective import build_objective
from alignkit.config.recipe import Recipe, dump_recipe
from alignkit.errors import CheckpointError, ModelError, ResourceError
from alignkit.files import write_text, writing
from alignkit.runs.checks import check_appraisal, check_without_torch
from alignkit.runs.inputs import inputs_of
from alignkit.runs.launch import resolve_task
from alignkit.training.signals import Interrupted

if TYPE_CHECKING:
    from alignkit.comparison.measure_run import Measurer
    from alignkit.objectives.base import Objective


def compare(
    recipe: Recipe, *, safe: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Run what is missing of the recipe's grid, measure it, and write the report.

    Returns what `results.json` holds.

    A run that fails is recorded with its reason and shown in the report; the others go on. A
    finished run whose model, rows or reward have changed since is named and left out. `safe`
    refuses code that the recipe brings.

    Raises ConfigError, DataError or ModelError before anything is trained where the grid, the
    folder, the prompts, the score or a tokenizer cannot be used; CheckpointError where no run is
    left that belongs to the recipe, or an interrupted one belongs to another; ResourceError where
    the disk refuses; and Interrupted on SIGINT and SIGTERM, after the runs in progress have written
    checkpoints.
    """
    console = console or Console(stderr=True)
    points = expand(recipe)
    decoders = expand_decoders(recipe)
    for point in points:
        check_without_torch(point.recipe, safe)
    check_folder(Path(recipe.output_dir).expanduser())
    if find_spec("matplotlib") is None:
        raise ResourceError("the report's pictures need matplotlib: pip install 'alignkit[eval]'")

    # From here on torch is needed.
    from alignkit.comparison.report import write_report
    from alignkit.comparison.results import gather
    from alignkit.training.run_folder import RunFolder

    objectives = check_points(recipe, points, safe)
    out = RunFolder(recipe.output_dir)
    with out, stoppable(points):
        start = time.monotonic()
        check_folder(out.path)  # once more, now that no other process can write to it
        points[:] = [with_inputs(*each) for each in zip(points, objectives)]
        stale = _stale(points, console)
        _refuse_all_stale(points, stale)

        measurer = _begin(recipe, out.path, safe, console)
        # The runs of the grid, and then those that a search for given KLs asks for.
        search = Search(recipe, points, stale, measurer)
        by_label = {point.label: objective for point, objective in zip(points, objectives)}
        new = points
        while new:
            _train_round(recipe, new, stale, measurer, safe, console)
            new = [with_inputs(point, by_label[point.label]) for point in search.next_runs()]
            stale |= _stale(new, console)
            points += new
        workers = section_of(recipe).workers
        measure_decoders(measurer, decoders, _process_count(workers, len(decoders)))

        seconds = time.monotonic() - start
        results = gather(recipe, points, measurer, stale, search=search, seconds=seconds)
        with writing(out.path):
            write_report(results, out.path)
    return results


def _begin(recipe: Recipe, folder: Path, safe: bool, console: Console) -> "Measurer":
    """Mark the folder, write the recipe into it and measure the base model, if it is not yet."""
    measurer = measurer_of(recipe, safe)
    mark_folder(folder)
    with writing(folder / "recipe.yaml"):
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
    for note in measurer.notes:
        _print(console, f"evaluation prompts: {note}")
    if measurer.read_base() is None:
        measurer.measure_base()
    return measurer


def _train_round(
    recipe: Recipe,
    points: Sequence[Point],
    stale: Mapping[str, str],
    measurer: "Measurer",
    safe: bool,
    console: Console,
) -> None:
    """Train and measure what is missing of `points`; those that are stale are left alone."""
    current = [point for point in points if point.name not in stale]
    _run_all(recipe, current, _left_to_do(current, measurer, console), safe, console)


def _left_to_do(current: Sequence[Point], measurer: "Measurer", console: Console) -> list[Point]:
    """The runs that are trained or measured now; says how many are not."""
    waiting = [point for point in current if _is_left_to_do(point, measurer)]
    for note in measurer.unreadable:
        _print(console, note)
    done = len(current) - len(waiting)
    if done:
        _print(console, f"{done} of {len(current)} runs are finished and not repeated")
    return waiting


def _is_left_to_do(point: Point, measurer: "Measurer") -> bool:
    """Whether a run is not trained yet, or not measured by these prompts and this score."""
    return read_run_state(point).status != "finished" or measurer.read_run(point) is None


def with_inputs(point: Point, objective: "Objective") -> Point:
    """The point with the hashes of the models, rows and code that decide what it trains. A reward
    or judge that its objective does not ask does not count.
    """
    feedback = objective.plan.feedback
    unused = set()
    if feedback != "reward":
        unused.add("rewards")
    if feedback in ("none", "reward"):
        unused.add("judge")
    sections = {name: value for name, value in point.settings.items() if name not in unused}
    return replace(point, inputs=inputs_of(sections))


def _stale(points: Sequence[Point], console: Console) -> dict[str, str]:
    """`stale_runs`, named on the console."""
    unchecked = unchecked_runs(points)
    if unchecked:
        _print(
            console,
            f"{len(unchecked)} runs were trained before hashes of their inputs were kept, so it is "
            "not checked that they belong to these models, rows and rewards",
        )

    stale = stale_runs(points)
    for name, reason in stale.items():
        _print(
            console,
            f"{name} is stale and left out: {reason}; delete its folder to train it again",
        )
    return stale


def _refuse_all_stale(points: Sequence[Point], stale: Mapping[str, str]) -> None:
    """CheckpointError where no run of the grid would be left."""
    if len(stale) < len(points):
        return
    reasons = "; ".join(dict.fromkeys(stale.values()))
    raise CheckpointError(
        f"no run in {Path(points[0].recipe.output_dir).parent} is of this comparison any more "
        f"({reasons}): undo the change, delete the runs to train them again, or choose another "
        "output_dir"
    )


def _print(console: Console, text: str) -> None:
    console.print(plain(text), highlight=False, soft_wrap=True)


def check_points(recipe: Recipe, points: Sequence[Point], safe: bool = False) -> list["Objective"]:
    """The objectives of the points, after the checks that need torch: their fields (ConfigError),
    rewards and judges that are missing (ConfigError), models with another tokenizer (ModelError).
    """
    objectives = [
        build_objective(
            point.recipe.objective, recipe.origin, safe=safe, keys=("compare", "grid", point.label)
        )
        for point in points
    ]
    for point, objective in zip(points, objectives):
        check_appraisal(point.recipe, objective, resolve_task(point.recipe))

    _check_tokenizers(recipe, points)
    return objectives


def _check_tokenizers(recipe: Recipe, points: Sequence[Point]) -> None:
    """ModelError where a point trains a model with other tokens than the recipe's."""
    from alignkit.policies.tokenizer import load_tokenizer, same_vocabulary

    # One point per model is enough, and the recipe's own model needs no check.
    by_model = {point.recipe.model.name_or_path: point for point in points}
    by_model.pop(recipe.model.name_or_path, None)
    if not by_model:
        return
    own = load_tokenizer(model_on_disk(recipe))
    for name, point in by_model.items():
        theirs = load_tokenizer(model_on_disk(point.recipe))
        if not same_vocabulary(own, theirs):
            place = recipe.origin.at(("compare", "overrides", point.label, "model", "name_or_path"))
            raise ModelError(
                f"{place}: `{point.label}` trains {name} ({len(theirs)} tokens), the others "
                f"{recipe.model.name_or_path} ({len(own)} tokens): models with different "
                "tokenizers cannot be compared by KL"
            )


def model_on_disk(recipe: Recipe) -> Any:
    """The recipe's model section, in which a task's model is named by its folder."""
    if recipe.model.name_or_path != "task":
        return recipe.model
    task = resolve_task(recipe)
    if task is None:
        return recipe.model
    return recipe.model.model_copy(update={"name_or_path": str(task.model_folder)})


def _run_all(
    recipe: Recipe, points: Sequence[Point], waiting: Sequence[Point], safe: bool, console: Console
) -> None:
    """Train and measure the points in `waiting`, in this process or in several others."""
    processes = _process_count(section_of(recipe).workers, len(waiting))
    if not processes:
        for point in waiting:
            train_and_measure(point, recipe=recipe, safe=safe, quiet=False)
        return

    from alignkit.comparison.run_pool import run_apart

    with LiveTable(points, processes, console) as table:
        run_apart(
            waiting,
            partial(train_and_measure, recipe=recipe, safe=safe, quiet=True),
            processes,
            crashed=lambda point, how: record_failure(point, f"{how}; its last words are in {LOG}"),
            watch=table.watch,
        )


def _process_count(asked: int | str, waiting: int) -> int:
    """Worker processes for `waiting` runs or decoders; "auto": one with a GPU, else one per usable core."""
    import torch

    if asked != "auto":
        return min(int(asked), waiting)
    if torch.cuda.is_available():
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), waiting))


@contextmanager
def stoppable(points: Sequence[Point]) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the comparison with a message that says how to go on."""

    def stop(signum: int, _: object) -> None:
        raise Interrupted(signum, f"stopped by signal {signum}")

    try:
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: leave signals to the host
        before = {}
    try:
        yield
    except Interrupted as error:
        done = sum(read_run_state(point).status == "finished" for point in points)
        raise Interrupted(
            error.exit_code - 128,
            f"stopped with {done} of {len(points)} runs finished; "
            "the same command goes on from here",
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
