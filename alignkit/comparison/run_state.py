"""What became of a run of a comparison, kept in its folder: so an interrupted comparison goes on
and repeats nothing.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from alignkit.comparison.grid import Point
from alignkit.errors import ConfigError
from alignkit.training.run_folder import compare as differences

FILE = "outcome.json"
Status = Literal["new", "started", "finished", "failed"]


@dataclass(frozen=True)
class Outcome:
    """`new`: nothing was done. `started`: interrupted, or going on. `failed`: with its reason."""

    status: Status = "new"
    reason: str = ""
    seconds: float = 0.0  # of training over all attempts, by the clock
    cpu_seconds: float = 0.0  # and by the processor: runs may share a machine
    settings: dict[str, Any] = field(default_factory=dict)  # the point's

    def write(self, folder: Path) -> None:
        """Keep it in the run's folder; whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f".{FILE}.tmp"
        beside.write_text(json.dumps(asdict(self), indent=1) + "\n")
        beside.replace(folder / FILE)


def outcome_of(point: Point) -> Outcome:
    """What its folder says of a point."""
    file = Path(point.recipe.output_dir) / FILE
    try:
        return Outcome(**json.loads(file.read_text()))
    except FileNotFoundError:
        return Outcome()
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}); delete its folder to run {point.name} again"
        ) from None


def prepare(points: Sequence[Point]) -> None:
    """Clear the folders of unfinished runs with other settings.

    ConfigError where a folder holds a finished run with other settings: it is neither this run's
    result nor ours to delete.
    """
    for point in points:
        folder = Path(point.recipe.output_dir)
        outcome = outcome_of(point)
        changed = differences(outcome.settings, point.settings) if outcome.status != "new" else []
        if changed and outcome.status == "finished":
            raise ConfigError(
                f"{folder} holds a finished run with other settings ({'; '.join(changed)}): undo the change, delete that folder, "
                "or choose another output_dir"
            )
        if changed:
            shutil.rmtree(folder)
