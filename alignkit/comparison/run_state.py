"""How far a run of a comparison has come, kept in the run's folder, so that an interrupted
comparison goes on where it stopped and repeats nothing.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from alignkit.comparison.grid import Point
from alignkit.errors import ConfigError
from alignkit.files import write_json
from alignkit.training.run_folder import compare as differences

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

    def write(self, folder: Path) -> None:
        """Write the state into the run's `folder`, which is made if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, asdict(self))


def read_run_state(point: Point) -> RunState:
    """The state that the folder of `point` holds; `new` where there is none yet.

    ConfigError for a file that cannot be read.
    """
    file = Path(point.recipe.output_dir) / FILE
    try:
        return RunState(**json.loads(file.read_text()))
    except FileNotFoundError:
        return RunState()
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}); delete its folder to run {point.name} again"
        ) from None


def clear_outdated_folders(points: Sequence[Point]) -> None:
    """Delete the folders of unfinished runs that were started with other settings.

    ConfigError where a folder holds a *finished* run with other settings: it is not the result of
    this run, and a finished run is not ours to delete.
    """
    for point in points:
        folder = Path(point.recipe.output_dir)
        state = read_run_state(point)
        changed = [] if state.status == "new" else differences(state.settings, point.settings)
        if not changed:
            continue

        if state.status == "finished":
            raise ConfigError(
                f"{folder} holds a finished run with other settings ({'; '.join(changed)}): "
                "undo the change, delete that folder, or choose another output_dir"
            )
        shutil.rmtree(folder)
