"""The run folder: lock, resolved recipe, metrics, samples, checkpoints, the finished model and its
card.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from alignkit import files
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
        self._lock = ExitStack()

    def __enter__(self) -> "RunFolder":
        if not self.writes:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(files.locked(self.path / ".lock", wait=False))
        except BlockingIOError:
            raise ResourceError(
                f"{self.path} is in use by another run; wait for it, stop it, or choose another output_dir"
            ) from None
        except OSError as error:
            raise ResourceError(
                f"cannot write to {self.path}: {error.strerror}; choose another output_dir"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @property
    def finished(self) -> bool:
        """The model is renamed into place as a run's last act."""
        return self.model.is_dir()

    def last_step(self) -> int:
        """The last step that is logged, 0 where none is."""
        rows = files.read_jsonl(self.path / "metrics.jsonl")
        return rows[-1]["step"] if rows else 0

    def logged(self, step: int) -> dict[str, Any]:
        """The row of metrics.jsonl of `step`; empty where there is none."""
        rows = files.read_jsonl(self.metrics_file)
        return next((row for row in reversed(rows) if row.get("step") == step), {})

    def refuse_to_overwrite(self) -> None:
        """A run that has results is continued, never overwritten."""
        if self.finished or checkpoint.steps(self.checkpoints):
            raise ConfigError(
                f"output_dir {self.path} already holds a run; continue it with --resume auto, or choose another output_dir"
            )

    def find(
        self, resume: str | None, identity: Mapping[str, Any]
    ) -> tuple[checkpoint.Checkpoint | None, list[str]]:
        """The checkpoint that `resume` (None, "auto" or a folder) names, with lines for the user
        about the search.

        CheckpointError if it belongs to another run: every difference from `identity` is named.
        """
        if resume is None:
            self.refuse_to_overwrite()
            return None, []
        damaged: list[checkpoint.Verdict] = []
        if resume == "auto":
            newest, damaged = checkpoint.newest(self.checkpoints)
        else:
            newest = checkpoint.load(Path(resume).expanduser())
        if newest is None:
            return None, ["no checkpoint yet: starting from the beginning"]

        differences = compare(newest.identity, identity)
        if differences and not self.finished:
            raise CheckpointError(
                f"checkpoint {newest.path.name} belongs to another run: {'; '.join(differences)}. Undo the change, or start "
                "without --resume in another output_dir"
            )
        notes = [f"skipped damaged checkpoint {v.path.name}: {v.reason}" for v in damaged]
        return newest, [*notes, f"resumed from {newest.path.name}"]

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
            files.write_text(self.path / "recipe.yaml", recipe)
            for file in (self.metrics_file, self.samples_file):
                rows = files.read_jsonl(file) if step > 0 else []
                past = [row for row in rows if row["step"] <= step]
                files.write_jsonl(file, past, ensure_ascii=True)
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
        if not self.writes:
            return
        try:
            files.append_jsonl(file, row)
        except OSError as error:
            raise ResourceError(
                f"cannot write {file}: {error.strerror}; free space, then go on with --resume auto"
            ) from error

    def save_model(self, write: Callable[[Path], None], card: str) -> None:
        """Write the finished model and the run's card; `model/` appears whole or not at all."""
        if not self.writes:
            return
        try:
            with files.replaced_folder(self.model) as temporary:
                write(temporary)
                (temporary / "README.md").write_text(card)
                files.write_text(self.path / "README.md", card)
        except Exception as error:
            reason = files.refusal_of_disk(error)
            if reason is None:
                raise
            raise ResourceError(
                f"cannot write {self.model}: {reason}; free space, then --resume auto"
            ) from error


def compare(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every leaf in which two nested mappings differ, as "name: old -> new"."""
    differences = []
    for key in sorted({*old, *new}):
        before = old.get(key)
        after = new.get(key)
        name = f"{prefix}{key}"

        if isinstance(before, Mapping) and isinstance(after, Mapping):
            differences += compare(before, after, f"{name}.")
        elif before != after:
            differences.append(f"{name}: {before} -> {after}")
    return differences
