"""The run folder: lock, resolved recipe, metrics, samples,
checkpoints, the finished model and its card.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from alignkit import files
from alignkit.errors import CheckpointError, ConfigError, ResourceError
from alignkit.training import checkpoint
from alignkit.training.identity import differences_between, is_longer_run, not_compared
from alignkit.training.log_end import cut_behind, rows_backwards
from alignkit.training.ownership import (
    CARD,
    MARK,
    WRITTEN,
    refuse_foreign_files,
    refuse_to_write_over,
)


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
            self._lock.enter_context(files.locked_folder(self.path))
        except BlockingIOError:
            raise ResourceError(
                f"{self.path} is in use by another run; wait for it, stop it, or choose another output_dir"
            ) from None
        except OSError as error:
            raise ResourceError(
                f"cannot write to {self.path}: {error.strerror}; choose another output_dir"
            ) from error

        for link in self._links():
            self._lock.close()
            raise ResourceError(
                f"{link} is a symbolic link; a run neither writes nor deletes behind one. Remove "
                "the link, or choose another output_dir"
            )
        return self

    def _links(self) -> Iterator[Path]:
        """The links that stand where a run writes or deletes."""
        own = [self.path / name for name in (*WRITTEN, "checkpoints", MARK, ".lock")]
        temporary = [*self.path.glob(".*.tmp"), *self.path.glob(".tmp-*")]
        inside = [] if self.checkpoints.is_symlink() else self.checkpoints.glob(".*tmp*")
        return (path for path in (*own, *temporary, *inside) if path.is_symlink())

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @property
    def finished(self) -> bool:
        """The model is renamed into place as a run's last act."""
        return self.model.is_dir()

    def last_row(self) -> dict[str, Any]:
        """The last row of metrics.jsonl, {} where there is none."""
        rows = rows_backwards(self.metrics_file)
        return next((row for row in rows if _step(row) is not None), {})

    def last_step(self) -> int:
        """The last step that is logged, 0 where none is."""
        return _step(self.last_row()) or 0

    def logged(self, step: int) -> dict[str, Any]:
        """The row of metrics.jsonl of `step`; empty where there is none."""
        for row in rows_backwards(self.metrics_file):
            number = _step(row)
            if number is not None and number <= step:
                return row if number == step else {}
        return {}

    def refuse_foreign_files(self, stores: Sequence[str] = ()) -> None:
        """ConfigError where the folder holds files and is no run's (`ownership`)."""
        refuse_foreign_files(self.path, stores)

    def refuse_results(self) -> None:
        """ConfigError where the folder has results: a run is continued, never overwritten."""
        if self.finished or checkpoint.steps(self.checkpoints):
            raise ConfigError(
                f"output_dir {self.path} already holds a run; continue it with --resume auto, or choose another output_dir"
            )

    def find(
        self, resume: str | None, identity: Mapping[str, Any], steps: int
    ) -> tuple[checkpoint.Checkpoint | None, list[str]]:
        """The checkpoint that `resume` (None, "auto" or a folder) names, with lines for the user
        about the search. `steps` is how many the run is to take.

        CheckpointError if it belongs to another run: every difference from `identity` is named.
        """
        refuse_to_write_over(self.path)
        if resume is None:
            self.refuse_results()
            return None, []

        damaged: list[checkpoint.Verdict] = []
        if resume == "auto":
            newest, damaged = checkpoint.newest(self.checkpoints)
        else:
            newest = checkpoint.load(Path(resume).expanduser())
        if newest is None and self.finished:
            raise CheckpointError(
                f"{self.path} is finished and has no checkpoint from which it could take more steps; start a new run from "
                f"its model, with model.name_or_path={self.model}"
            )
        if newest is None:
            return None, ["no checkpoint yet: starting from the beginning"]

        differences = differences_between(newest.identity, identity)
        more_steps = is_longer_run(newest.identity, identity)
        if differences and not more_steps:
            raise _another_run(f"checkpoint {newest.path.name} belongs to", differences)

        notes = [f"skipped damaged checkpoint {v.path.name}: {v.reason}" for v in damaged]
        notes += not_compared(newest.path.name, newest.identity, identity)
        if more_steps:
            notes.append(
                f"more steps than before ({'; '.join(differences)}): the schedule of the learning rate now ends at step {steps}, "
                f"from {newest.path.name} on"
            )
        return newest, [*notes, f"resumed from {newest.path.name}"]

    def refuse_another_recipe(self, resume: str, recipe: Mapping[str, Any]) -> None:
        """CheckpointError where the recipe's part of what the result, or the checkpoint that
        `resume` names, says of its run differs from `recipe`. For the start, before models and data
        are loaded: `is_result_of` and `find` compare the whole identity.
        """
        steps = checkpoint.steps(self.checkpoints)
        if resume != "auto":
            folder = Path(resume).expanduser()
        else:
            folder = self.checkpoints / f"step-{max(steps, default=0)}"

        for path, words in [
            (self.model, f"{self.path} is finished and the result of"),
            (folder, f"checkpoint {folder.name} belongs to"),
        ]:
            identity = files.read_manifest(path).get("identity")
            if not isinstance(identity, Mapping):  # absent, damaged, or of an earlier version
                continue
            recorded = {section: identity[section] for section in recipe if section in identity}
            differences = differences_between(recorded, recipe)
            if differences and not is_longer_run(recorded, recipe):
                raise _another_run(words, differences)

    def is_result_of(self, identity: Mapping[str, Any]) -> bool:
        """Whether the run is finished and nothing is left to do; False if `identity` asks for more
        steps of the same run.

        CheckpointError where model/ is the result of another run (every difference from `identity`
        is named), or is damaged.
        """
        if not self.finished:
            return False
        refuse_to_write_over(self.path)

        finished = files.read_manifest(self.model).get("identity")
        if finished is None:  # of an earlier version, or damaged
            whole = [v for v in checkpoint.verify(self.checkpoints) if v.reason is None]
            finished = files.read_manifest(whole[-1].path)["identity"] if whole else identity

        differences = differences_between(finished, identity)
        if is_longer_run(finished, identity):
            return False
        if differences:
            raise _another_run(f"{self.path} is finished and the result of", differences)

        has_manifest = (self.model / files.MANIFEST).exists()
        reason = files.check_manifest(self.model) if has_manifest else None
        if reason:
            raise CheckpointError(
                f"{self.model} is damaged: {reason}. Delete the folder; --resume auto then writes it again"
            )
        return True

    def last_good(self) -> str:
        """Where a run that stopped can be taken up, in words."""
        good = [v for v in checkpoint.verify(self.checkpoints) if v.reason is None]
        if not good:
            return "There is no checkpoint to go on from"
        return f"The last good checkpoint is {good[-1].path.name}; --resume auto goes on from it"

    def start(self, recipe: str, step: int) -> list[str]:
        """Write the resolved recipe and cut the logs back to `step` (0 for a new run). Returns
        lines for the user about rows that could not be read.
        """
        if not self.writes:
            return []

        notes = []
        try:
            files.write_json(self.path / MARK, {"alignkit": "run folder", "format": 1})
            files.write_text(self.path / "recipe.yaml", recipe)
            for file in (self.metrics_file, self.samples_file):
                lost = _cut(file, step)
                if lost:
                    notes.append(f"{file.name}: {lost} lines could not be read and are left out")
        except OSError as error:
            raise ResourceError(
                f"cannot write to {self.path}: {error.strerror}; free space or mend the disk"
            ) from error
        return notes

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
                f"cannot write {file}: {error.strerror}; free space. {self.last_good()}"
            ) from error

    def save_model(
        self, write: Callable[[Path], None], card: str, identity: Mapping[str, Any] | None = None
    ) -> None:
        """Write the finished model, a manifest of its files with the run's identity, and the run's
        card; `model/` appears whole or not at all.

        ResourceError where the disk refuses. The model is then written to the folder for temporary
        files, if it fits there, so that the training is not lost.
        """
        if not self.writes:
            return
        try:
            with files.replaced_folder(self.model) as temporary:
                write(temporary)
                (temporary / CARD).write_text(card)
                # People edit the card, so its bytes are not vouched for.
                content = checkpoint.manifest_content(identity or {})
                files.write_manifest(temporary, content, without=[CARD])
                files.write_text(self.path / CARD, card)
        except Exception as error:
            reason = files.refusal_of_disk(error)
            if reason is None:
                raise
            raise ResourceError(
                f"cannot write {self.model}: {reason}; free space. {self._rescued(write)}{self.last_good()}"
            ) from error

    def _rescued(self, write: Callable[[Path], None]) -> str:
        """Write the model where there may be room for it; where it is, in words."""
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"alignkit-{self.path.name}-"))
        except OSError:
            return ""
        try:
            write(folder)
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            if files.refusal_of_disk(error) is None:
                raise
            return ""
        return f"The trained model is in {folder} until then. "


def _another_run(words: str, differences: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"{words} another run: {'; '.join(differences)}. Undo the change, or start without --resume in another output_dir"
    )


def _cut(file: Path, step: int) -> int:
    """Cut the file back to the row of `step`; how many lines had to go because they have no step
    that can be read.
    """
    if step == 0:
        files.write_text(file, "")
        return 0
    without_step = 0

    def is_past(row: Mapping[str, Any]) -> bool:
        nonlocal without_step
        number = _step(row)
        without_step += number is None
        return number is not None and number <= step

    unreadable = cut_behind(file, is_past)
    return unreadable + without_step


def _step(row: Mapping[str, Any]) -> int | None:
    step = row.get("step")
    return step if isinstance(step, int) else None
