"""Runs a grid of objectives, measures every result alike and writes one report.

    from alignkit.config.recipe import load_recipe
    from alignkit.comparison.compare import compare
    compare(load_recipe("compare"))

OUT (the recipe's output_dir) holds `runs/NAME` (ordinary run folders), `reference` (the one
reference pass), `results.json`, `report.md`, `report.html` and the figures. The same call goes on
where an interrupted one stopped.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from alignkit.comparison.grid import Point, expand, section_of
from alignkit.comparison.live_table import LiveTable
from alignkit.comparison.run_state import Outcome, Status, outcome_of, prepare
from alignkit.config.objective import build_objective
from alignkit.config.recipe import Recipe, dump_recipe
from alignkit.errors import AlignkitError, ModelError, ResourceError
from alignkit.runs.checks import check_appraisal, check_without_torch
from alignkit.runs.launch import resolve_task
from alignkit.training.signals import Interrupted

MEASURED = "measured.json"
LOG = "log.txt"
log = logging.getLogger("alignkit")


def compare(
    recipe: Recipe, *, safe: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Run what is missing of the recipe's grid, measure, and write the report; what `results.json`
    holds is returned.

    A run that fails is recorded with its reason and shown in the report; the others go on. `safe`
    refuses code that the recipe brings. Raises ConfigError, DataError or ModelError before anything
    is trained where the grid, the prompts, the score or a tokenizer cannot be used, and Interrupted
    on SIGINT and SIGTERM, after the runs at work wrote checkpoints.
    """
    console = console or Console(stderr=True)
    points = expand(recipe)
    for point in points:
        check_without_torch(point.recipe, safe)
    if find_spec("matplotlib") is None:
        raise ResourceError("the report's pictures need matplotlib: pip install 'alignkit[eval]'")
    from alignkit.comparison.report import write_report
    from alignkit.comparison.results import gather
    from alignkit.training.run_folder import RunFolder

    check_points(recipe, points, safe)
    out = RunFolder(recipe.output_dir)
    with out, _stoppable(points):
        began = time.monotonic()
        prepare(points)
        appraiser = _appraiser(recipe, safe)
        (out.path / "recipe.yaml").write_text(dump_recipe(recipe))
        for note in appraiser.notes:
            console.print(
                f"evaluation prompts: {note}", highlight=False, soft_wrap=True, markup=False
            )
        _measure_base(out.path, appraiser)
        waiting = [
            point
            for point in points
            if outcome_of(point).status != "finished" or _stale(point, appraiser.key)
        ]
        if len(waiting) < len(points):
            console.print(
                f"{len(points) - len(waiting)} of {len(points)} runs are finished and not repeated",
                highlight=False,
            )
        _run(recipe, points, waiting, safe, console)
        results = gather(recipe, points, appraiser, seconds=time.monotonic() - began)
        write_report(results, out.path)
    return results


def check_points(recipe: Recipe, points: Sequence[Point], safe: bool = False) -> None:
    """What needs torch to be refused: fields of objectives, missing rewards and judges, models of
    another tokenizer.
    """
    from alignkit.policies.load import load_tokenizer, same_vocabulary

    objectives = [
        build_objective(
            point.recipe.objective, recipe.origin, safe=safe, keys=("compare", "grid", point.label)
        )
        for point in points
    ]
    for point, objective in zip(points, objectives):
        check_appraisal(point.recipe, objective, resolve_task(point.recipe))
    own = None
    for point in {point.recipe.model.name_or_path: point for point in points}.values():
        if point.recipe.model.name_or_path == recipe.model.name_or_path:
            continue
        own = own or load_tokenizer(_on_disk(recipe))
        theirs = load_tokenizer(_on_disk(point.recipe))
        if not same_vocabulary(own, theirs):
            place = recipe.origin.at(("compare", "overrides", point.label, "model", "name_or_path"))
            raise ModelError(
                f"{place}: `{point.label}` trains {point.recipe.model.name_or_path} ({len(theirs)} tokens), the others "
                f"{recipe.model.name_or_path} ({len(own)} tokens): models with different tokenizers cannot be compared by KL"
            )


def _on_disk(recipe: Recipe) -> Any:
    """The recipe's model section with a task's model by its folder."""
    task = resolve_task(recipe) if recipe.model.name_or_path == "task" else None
    return (
        recipe.model.model_copy(update={"name_or_path": str(task.model_folder)})
        if task
        else recipe.model
    )


def work(point: Point, *, recipe: Recipe, safe: bool, quiet: bool) -> None:
    """Train one point unless it is trained, measure it unless it is measured; a failure becomes its
    outcome.
    """
    import torch

    folder = Path(point.recipe.output_dir)
    if quiet:  # one of several
        torch.set_num_threads(1)
    with _logged(folder / LOG) if quiet else nullcontext():
        try:
            if outcome_of(point).status != "finished":
                _train(point, safe)
            _measure(point, recipe, safe)
        except AlignkitError as error:
            if error.exit_code > 128:
                raise  # a signal: the run is to be continued, it has not failed
            _failed(point, str(error))
        except Exception as error:  # whatever a user's code raises: the other runs go on
            log.exception("%s failed", point.name)
            _failed(point, f"{type(error).__name__}: {error}")


def _train(point: Point, safe: bool) -> None:
    from alignkit.runs.launch import run_recipe

    folder = Path(point.recipe.output_dir)
    before = outcome_of(point)
    began = time.monotonic() - before.seconds
    cpu = time.process_time() - before.cpu_seconds
    reached: Status = "started"
    replace(before, status=reached, reason="", settings=point.settings).write(folder)
    try:
        run_recipe(point.recipe, "auto", safe=safe)
        reached = "finished"
    finally:
        spent = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu}
        Outcome(reached, **spent, settings=point.settings).write(folder)


def _measure(point: Point, recipe: Recipe, safe: bool) -> None:
    from alignkit.evaluation.measurements import Measured

    appraiser = _appraiser(recipe, safe)
    if not _stale(point, appraiser.key):
        return
    base = json.loads((Path(recipe.output_dir) / "base.json").read_text())
    found = appraiser.run(point, Measured.load(base["measured"]))
    _write_json(Path(point.recipe.output_dir) / MEASURED, found)


def _failed(point: Point, reason: str) -> None:
    kept = replace(outcome_of(point), status="failed", reason=reason, settings=point.settings)
    kept.write(Path(point.recipe.output_dir))


def _stale(point: Point, key: str) -> bool:
    file = Path(point.recipe.output_dir) / MEASURED
    return not file.exists() or json.loads(file.read_text())["key"] != key


def _measure_base(out: Path, appraiser: Any) -> None:
    file = out / "base.json"
    if not file.exists() or json.loads(file.read_text())["key"] != appraiser.key:
        _write_json(file, appraiser.base())


_appraisers: dict[str, Any] = {}


def _appraiser(recipe: Recipe, safe: bool) -> Any:
    """This process's appraiser of the recipe: its models and rewards are loaded once."""
    from alignkit.comparison.measure_run import Appraiser

    key = dump_recipe(recipe)
    if key not in _appraisers:
        _appraisers.clear()
        _appraisers[key] = Appraiser(recipe, safe=safe)
    return _appraisers[key]


def _run(
    recipe: Recipe, points: Sequence[Point], waiting: Sequence[Point], safe: bool, console: Console
) -> None:
    processes = _processes(section_of(recipe).workers, len(waiting))
    if not processes:
        for point in waiting:
            work(point, recipe=recipe, safe=safe, quiet=False)
        return
    from alignkit.comparison.run_pool import run_apart

    with LiveTable(points, processes, console) as table:
        run_apart(
            waiting,
            partial(work, recipe=recipe, safe=safe, quiet=True),
            processes,
            crashed=lambda point, how: _failed(point, f"{how}; its last words are in {LOG}"),
            watch=table.watch,
        )


def _processes(asked: int | str, waiting: int) -> int:
    """Worker processes: one per core that this process may use, on a GPU one."""
    import torch

    if asked != "auto":
        return min(int(asked), waiting)
    return 1 if torch.cuda.is_available() else max(1, min(len(os.sched_getaffinity(0)), waiting))


@contextmanager
def _stoppable(points: Sequence[Point]) -> Iterator[None]:
    """SIGINT and SIGTERM end the comparison with a word on how to go on."""

    def stop(signum: int, _: object) -> None:
        raise Interrupted(signum, f"stopped by signal {signum}")

    try:
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: leave signals to the host
        before = {}
    try:
        yield
    except Interrupted as error:
        done = sum(outcome_of(point).status == "finished" for point in points)
        raise Interrupted(
            error.exit_code - 128,
            f"stopped with {done} of {len(points)} runs finished; the same command goes on from here",
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _logged(file: Path) -> Iterator[None]:
    """What is printed inside, by Python or below it, is appended to `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = [os.dup(1), os.dup(2)]
    with file.open("a") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, old in zip((1, 2), kept):
            os.dup2(old, stream)
            os.close(old)


def _write_json(file: Path, content: Any) -> None:
    beside = file.with_name(f".{file.name}.tmp")
    beside.write_text(json.dumps(content))
    beside.replace(file)
