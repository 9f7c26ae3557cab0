"""The run folder: lock, resolved recipe, metrics, samples, checkpoints, the finished model and its
card.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from alignkit.errors import CheckpointError, ConfigError, ResourceError
from alignkit.training import checkpoint


class RunFolder:
    """One training run on disk. Only the main process writes; the lock is the operating system's,
    so a killed run leaves none.
    """

    def __init__(self, path: str | Path, *, writes: bool = True):
        self.path = Path(path).expanduser().resolve()
        self.writes = writes
        self.metrics_file = self.path / "metrics.jsonl"
        self.samples_file = self.path / "samples.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self._lock: int | None = None

    def __enter__(self) -> "RunFolder":
        if self.writes:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.__exit__()
                raise ResourceError(
                    f"{self.path} is in use by another run; wait for it, stop it, or choose another output_dir"
                ) from None
            except OSError as error:
                raise ResourceError(
                    f"cannot write to {self.path}: {error.strerror}; choose another output_dir"
                ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def finished(self) -> bool:
        """The model is renamed into place as a run's last act."""
        return self.model.is_dir()

    def last_step(self) -> int:
        """The last step that is logged, 0 where none is."""
        rows = read_lines(self.path / "metrics.jsonl")
        return rows[-1]["step"] if rows else 0

    def refuse_to_overwrite(self) -> None:
        """A run that has results is continued, never overwritten."""
        if self.finished or checkpoint.steps(self.checkpoints):
            raise ConfigError(
                f"output_dir {self.path} already holds a run; continue it with --resume auto, or choose another output_dir"
            )

    def find(
        self, resume: str | None, identity: Mapping[str, Any]
    ) -> tuple[checkpoint.Checkpoint | None, list[str]]:
        """The checkpoint that `resume` (None, "auto" or a folder) names, and what to tell about the
        search.

        CheckpointError if it belongs to another run: every difference from `identity` is named.
        """
        if resume is None:
            self.refuse_to_overwrite()
            return None, []
        skipped: list[checkpoint.Verdict] = []
        if resume == "auto":
            found, skipped = checkpoint.newest(self.checkpoints)
        else:
            found = checkpoint.load(Path(resume).expanduser())
        notes = [f"skipped damaged checkpoint {v.path.name}: {v.reason}" for v in skipped]
        if found is None:
            return None, ["no checkpoint yet: starting from the beginning"]
        differences = compare(found.identity, identity)
        if differences and not self.finished:
            raise CheckpointError(
                f"checkpoint {found.path.name} belongs to another run: {'; '.join(differences)}. Undo the change, or start "
                "without --resume in another output_dir"
            )
        return found, [*notes, f"resumed from {found.path.name}"]

    def last_good(self) -> str:
        """Where a run that stopped can be taken up, in words."""
        good = [v for v in checkpoint.verify(self.checkpoints) if v.reason is None]
        if not good:
            return "There is no checkpoint to go on from"
        return f"The last good checkpoint is {good[-1].path.name}; --resume auto goes on from it"

    def start(self, recipe: str, step: int) -> None:
        """Write the resolved recipe and cut the logs back to `step` (0 for a new run)."""
        if not self.writes:
            return
        try:
            checkpoint.write_text(self.path / "recipe.yaml", recipe)
            for file in (self.metrics_file, self.samples_file):
                kept = [line for line in read_lines(file) if line["step"] <= step and step > 0]
                checkpoint.write_text(file, "".join(json.dumps(line) + "\n" for line in kept))
        except OSError as error:
            raise ResourceError(
                f"cannot write to {self.path}: {error.strerror}; free space or mend the disk"
            ) from error

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl."""
        self._append(self.metrics_file, row)

    def log_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to samples.jsonl."""
        for row in rows:
            self._append(self.samples_file, row)

    def _append(self, file: Path, row: Mapping[str, Any]) -> None:
        if self.writes:
            try:
                with file.open("a") as out:
                    out.write(json.dumps(row) + "\n")
            except OSError as error:
                raise ResourceError(
                    f"cannot write {file}: {error.strerror}; free space, then go on with --resume auto"
                ) from error

    def save_model(self, write: Callable[[Path], None], card: str) -> None:
        """Write the finished model and the run's card; `model/` appears whole or not at all."""
        if not self.writes:
            return
        beside = self.path / ".tmp-model"
        shutil.rmtree(beside, ignore_errors=True)
        try:
            write(beside)
            (self.path / "README.md").write_text(card)
            (beside / "README.md").write_text(card)
            for file in beside.iterdir():
                checkpoint.fsync(file)
            beside.rename(self.model)
            checkpoint.fsync(self.path)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            reason = getattr(error, "strerror", None) or error
            raise ResourceError(
                f"cannot write {self.model}: {reason}; free space, then --resume auto"
            ) from error


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file that this package wrote; a torn last line (a killed run) is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def compare(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every leaf in which two nested mappings differ, as "name: old -> new"."""
    found = []
    for key in sorted({*old, *new}):
        a = old.get(key)
        b = new.get(key)
        name = f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += compare(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name}: {a} -> {b}")
    return found
