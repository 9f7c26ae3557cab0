"""Atomic, verified checkpoints: safetensors and JSON under a
manifest with SHA-256; no pickle in or out.

Importing this imports no torch: which checkpoints there are is asked before anything is loaded.

`step-N/` appears by one rename after every file and the folder were written and synced, so a reader
sees a whole checkpoint or none. Files that do not match their manifest are named and the checkpoint
before them is used.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from alignkit import files
from alignkit.errors import CheckpointError
from alignkit.files import MANIFEST

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.policies.slices import StoredTensors

BEST = "best.json"
STATE = "state.json"
PART = re.compile(r"-\d{5}-of-\d{5}$")
STEP = re.compile(r"step-(0|[1-9][0-9]*)", re.ASCII)
LIBRARIES = ("torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint read back: groups of tensors, plain JSON state, and what it belongs to."""

    step: int
    path: Path
    # Group ("policy", "optimizer", ...) -> name -> tensor, read when it is asked for.
    tensors: "dict[str, StoredTensors]"
    state: dict[str, Any]
    identity: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint folder is whole, and if not, why."""

    path: Path
    step: int
    reason: str | None  # None = valid
    best: bool = False


def save(
    folder: Path,
    step: int,
    tensors: "Mapping[str, Mapping[str, Tensor]]",
    state: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> Path:
    """Write `folder/step-N` and return it. Raises CheckpointError where the disk refuses; older
    checkpoints stay whole.

    A checkpoint of the same step (an earlier run came this far; it may be damaged) is replaced.
    """
    from alignkit.policies.slices import save_parts

    final = folder / f"step-{step}"
    with explained(folder, step):
        with files.replaced_folder(final) as temporary:
            for group, content in tensors.items():
                save_parts(content, temporary / f"{group}.safetensors")
            (temporary / STATE).write_text(json.dumps(state))
            files.write_manifest(temporary, {"step": step, **manifest_content(identity)})
        files.fsync(folder.parent)  # `folder` itself may be new
    return final


@contextmanager
def explained(folder: Path, step: int) -> Iterator[None]:
    """CheckpointError for what the disk refuses inside the block, with the way on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors has an error of its own for a full disk
        reason = getattr(error, "strerror", None) or error
        older = [n for n in steps(folder) if check(folder / f"step-{n}") is None]
        way_on = (
            ", then go on with --resume auto (older checkpoints are untouched)"
            if older
            else "; there is no older checkpoint to go on from"
        )
        raise CheckpointError(
            f"could not write checkpoint step-{step} to {folder}: {reason}; "
            f"free space or mend the disk{way_on}"
        ) from error


def manifest_content(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest of a checkpoint or of a finished model says besides its files."""
    return {"identity": dict(identity), "versions": {name: version(name) for name in LIBRARIES}}


def steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint folder, oldest first."""
    names = [p.name for p in folder.glob("step-*") if p.is_dir() and not p.is_symlink()]
    return sorted(int(name[5:]) for name in names if STEP.fullmatch(name))


def check(path: Path) -> str | None:
    """None if every file matches the manifest, else the first thing that is wrong."""
    reason = files.check_manifest(path)
    if reason:
        return reason

    manifest = files.read_manifest(path)
    needed = {"step": manifest, "identity": manifest, STATE: manifest["files"]}
    missing = [name for name, place in needed.items() if name not in place]
    return f"{MANIFEST} does not say {missing[0]}" if missing else None


def verify(folder: Path) -> list[Verdict]:
    """Every checkpoint of a run with its verdict, oldest first."""
    best = best_step(folder)
    return [
        Verdict(folder / f"step-{n}", n, check(folder / f"step-{n}"), n == best)
        for n in steps(folder)
    ]


def load(path: Path) -> Checkpoint:
    """Read one checkpoint folder after checking it; raises CheckpointError with the reason."""
    reason = check(path)
    if reason:
        raise CheckpointError(
            f"checkpoint {path} is damaged: {reason}; use another one or start without --resume"
        )
    return _read(path)


def _read(path: Path) -> Checkpoint:
    from alignkit.policies.slices import StoredTensors

    manifest = files.read_manifest(path)
    # Only what the manifest names: a file browser or an archive may leave files of its own.
    groups: dict[str, list[Path]] = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            # Processes that hold shards write a file each: policy-00001-of-00004.safetensors.
            groups.setdefault(PART.sub("", Path(name).stem), []).append(path / name)
    return Checkpoint(
        manifest["step"],
        path,
        {group: StoredTensors(parts) for group, parts in groups.items()},
        json.loads((path / STATE).read_text()),
        manifest["identity"],
    )


def newest(folder: Path) -> tuple[Checkpoint | None, list[Verdict]]:
    """The newest valid checkpoint (None where the run has none at all) and the damaged ones that
    were passed over.

    Raises CheckpointError if checkpoints exist and none is valid.
    """
    skipped: list[Verdict] = []
    for step in reversed(steps(folder)):
        path = folder / f"step-{step}"
        reason = check(path)
        if reason is None:
            return _read(path), skipped
        skipped.append(Verdict(path, step, reason))
    if skipped:
        listed = "; ".join(f"{v.path.name}: {v.reason}" for v in skipped)
        raise CheckpointError(
            f"no valid checkpoint in {folder} ({listed}); start again without --resume in another output_dir"
        )
    return None, []


def best_step(folder: Path) -> int | None:
    """The step that an evaluation found best, which is kept, if there was one."""
    try:
        step = json.loads((folder / BEST).read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def mark_best(folder: Path, step: int) -> None:
    """Record which step an evaluation found best. CheckpointError where the disk refuses."""
    try:
        files.write_text(folder / BEST, json.dumps({"step": step}))
    except OSError as error:
        raise CheckpointError(
            f"could not write {folder / BEST}: {error.strerror}; free space, then --resume auto"
        ) from error


def prune(folder: Path, step: int, keep: int) -> None:
    """After the save of `step`, delete all but the newest `keep` checkpoints up to it and the best.

    Later ones, left by a run that went further and was then damaged, do not count; they are
    replaced when the run gets there. Folders without our manifest are never deleted.
    """
    past = [n for n in steps(folder) if n <= step]
    for old in set(past) - {*past[-keep:], best_step(folder)}:
        path = folder / f"step-{old}"
        if (path / MANIFEST).is_file():
            # Renamed first, so that nobody ever sees half a checkpoint.
            path.rename(folder / f".tmp-step-{old}-{os.getpid()}-old")

    # Those, and what a killed run left: the run's lock says that nobody else writes here now.
    for left_over in folder.glob(".tmp-step-*"):
        shutil.rmtree(left_over, ignore_errors=True)
