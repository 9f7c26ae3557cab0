"""How far a run of a comparison has come and what it was made from, kept in the run's folder, so
that an interrupted comparison goes on where it stopped, repeats nothing and mixes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from alignkit.comparison.grid import Point
from alignkit.errors import CheckpointError, ConfigError
from alignkit.files import write_json, writing
from alignkit.runs.inputs import changed_inputs, content_hash
from alignkit.training import checkpoint
from alignkit.training.identity import differences_between

FILE = "outcome.json"
Status = Literal["new", "started", "finished", "failed"]


@dataclass(frozen=True)
class RunState:
    """The state of one run: `new` (nothing was done), `started` (running, or interrupted),
    `finished` (trained) or `failed` (with its reason).
    """

    status: Status = "new"
    reason: str = ""  # why it failed
    seconds: float = 0.0  # spent on training over all attempts, by the clock
    cpu_seconds: float = 0.0  # the same by the processor, since runs may share a machine
    settings: dict[str, Any] = field(default_factory=dict)  # `Point.settings` of the run
    # `Point.inputs` of the run; empty where an earlier version of alignkit began it
    inputs: dict[str, str] = field(default_factory=dict)
    model: str = ""  # hash of the finished model's folder

    def write(self, folder: Path) -> None:
        """Write the state into the run's `folder`, which is made if it is missing. ResourceError
        where the disk refuses.
        """
        with writing(folder / FILE):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / FILE, asdict(self))


STATE: TypeAdapter[RunState] = TypeAdapter(RunState)


def read_run_state(point: Point) -> RunState:
    """The state that the folder of `point` holds; `new` where there is none yet.

    CheckpointError for a file that cannot be read.
    """
    file = folder_of(point) / FILE
    try:
        return STATE.validate_json(file.read_bytes())
    except FileNotFoundError:
        return RunState()
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise CheckpointError(
            f"{file} cannot be read ({reason}); delete its folder to run {point.name} again"
        ) from None


def folder_of(point: Point) -> Path:
    """The run's folder."""
    return Path(point.recipe.output_dir).expanduser()


def stale_runs(points: Sequence[Point]) -> dict[str, str]:
    """Name -> reason of the finished runs that are not what `points` would train today, because a
    model, rows, a reward or their own result have another content now.

    ConfigError or CheckpointError where going on would throw training away: a finished run whose
    settings have changed, and an unfinished one with checkpoints whose settings or inputs have.
    """
    stale = {}
    for point in points:
        state = read_run_state(point)
        folder = folder_of(point)
        if state.status == "new":
            continue

        settings = differences_between(state.settings, point.settings)
        inputs = changed_inputs(state.inputs, dict(point.inputs))
        if state.status == "finished":
            if settings:
                raise ConfigError(
                    f"{folder} holds a finished run with other settings ({'; '.join(settings)}): "
                    "undo the change, delete that folder, or choose another output_dir"
                )
            if state.model and content_hash(folder / "model") != state.model:
                inputs = [*inputs, "its model/ is not the one that was trained"]
            if inputs:
                stale[point.name] = "; ".join(inputs)

        elif (settings or inputs) and _has_training(folder):
            _refuse_unfinished(folder, settings, inputs)
    return stale


def _has_training(folder: Path) -> bool:
    """Whether an unfinished run left something to go on from, or
    its model where only the measurement failed.
    """
    return bool(checkpoint.steps(folder / "checkpoints")) or (folder / "model").is_dir()


def _refuse_unfinished(folder: Path, settings: Sequence[str], inputs: Sequence[str]) -> None:
    """Name what differs from the run whose checkpoints would be lost."""
    changes = "; ".join([*settings, *inputs])
    words = (
        f"{folder} holds an unfinished run, and since it began something has "
        f"changed ({changes}): undo the change to go on with it, delete that folder to begin it "
        "again, or choose another output_dir"
    )
    raise ConfigError(words) if settings else CheckpointError(words)


def unchecked_runs(points: Sequence[Point]) -> list[str]:
    """Names of the finished runs of earlier versions, which kept no hashes of what they read."""
    states: Mapping[str, RunState] = {point.name: read_run_state(point) for point in points}
    return [
        name for name, state in states.items() if state.status == "finished" and not state.inputs
    ]
