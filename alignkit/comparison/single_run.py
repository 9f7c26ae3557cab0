"""One run of a comparison: train it unless it is trained, measure it unless it is measured."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.comparison.grid import Point
from alignkit.comparison.run_state import RunState, Status, read_run_state
from alignkit.config.recipe import Recipe, dump_recipe
from alignkit.errors import AlignkitError
from alignkit.files import writing
from alignkit.runs.inputs import content_hash, inputs_of

if TYPE_CHECKING:
    from alignkit.comparison.measure_run import Measurer

LOG = "log.txt"
log = logging.getLogger("alignkit")


def train_and_measure(point: Point, *, recipe: Recipe, safe: bool, quiet: bool) -> None:
    """Train and measure one `point` of the grid of `recipe`, as far as that is not done yet.

    A failure is written to the run's state instead of being raised, so that the other runs go on.
    `quiet` is for one of several processes: it takes one thread and prints into the run's log.
    """
    import torch

    if quiet:
        torch.set_num_threads(1)
    log_file = Path(point.recipe.output_dir) / LOG

    with printing_into(log_file) if quiet else nullcontext():
        try:
            if read_run_state(point).status != "finished":
                train_point(point, safe)
            _measure(point, recipe, safe)
        except AlignkitError as error:
            if error.exit_code > 128:
                raise  # a signal: the run will be continued, it has not failed
            record_failure(point, str(error))
        except Exception as error:  # whatever a user's code raises: the other runs go on
            log.exception("%s failed", point.name)
            record_failure(point, f"{type(error).__name__}: {error}")


def record_failure(point: Point, reason: str) -> None:
    """Write into the folder of `point` that its run failed, and why."""
    failed = replace(_state_of(point), status="failed", reason=reason)
    failed.write(Path(point.recipe.output_dir))


def _state_of(point: Point) -> RunState:
    """The run's state so far, of the settings and inputs that it has today."""
    return replace(
        read_run_state(point), settings=point.settings, inputs=dict(point.inputs), reason=""
    )


_measurers: dict[str, "Measurer"] = {}


def measurer_of(recipe: Recipe, safe: bool) -> "Measurer":
    """The measurer of `recipe`, made once per process since it loads a model and the rewards; once
    more where a model, rows or code have another content since.
    """
    from alignkit.comparison.measure_run import Measurer

    contents = inputs_of(recipe.model_dump(mode="json"))
    key = dump_recipe(recipe) + repr(contents)
    if key not in _measurers:
        _measurers.clear()  # one at a time is enough
        _measurers[key] = Measurer(recipe, safe=safe)
    return _measurers[key]


def train_point(point: Point, safe: bool) -> None:
    """Train one `point`, from its checkpoints where it has some, and note how far it came and what it
    cost. Raises what `run_recipe` raises.
    """
    from alignkit.runs.launch import run_recipe

    folder = Path(point.recipe.output_dir)
    before = _state_of(point)
    status: Status = "started"
    replace(before, status=status).write(folder)

    # Both clocks start in the past by what earlier attempts took.
    clock_start = time.monotonic() - before.seconds
    cpu_start = time.process_time() - before.cpu_seconds
    try:
        run_recipe(point.recipe, "auto", safe=safe)
        status = "finished"
    finally:
        replace(
            before,
            status=status,
            seconds=time.monotonic() - clock_start,
            cpu_seconds=time.process_time() - cpu_start,
            model=content_hash(folder / "model"),
        ).write(folder)


def _measure(point: Point, recipe: Recipe, safe: bool) -> None:
    measurer = measurer_of(recipe, safe)
    if measurer.read_run(point) is None:
        measurer.measure_run(point)


@contextmanager
def printing_into(file: Path) -> Iterator[None]:
    """Append what is printed inside, by Python or by a library below it, to `file`."""
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        # A link could lead to any file, so it is not followed.
        log_file = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)

    terminal = [os.dup(1), os.dup(2)]
    for stream in (1, 2):
        os.dup2(log_file, stream)
    os.close(log_file)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, original in zip((1, 2), terminal):
            os.dup2(original, stream)
            os.close(original)
