"""Whose folder an `output_dir` is: a run writes and deletes in its own alone."""

from collections.abc import Sequence
from pathlib import Path

from alignkit import files
from alignkit.errors import ConfigError
from alignkit.training import checkpoint

CARD = "README.md"

# The file by which a run knows a folder as its own.
MARK = ".run.json"

# What a run writes besides its mark and its checkpoints.
WRITTEN = ("recipe.yaml", "metrics.jsonl", "samples.jsonl", CARD, "model")

# What may stand in a folder before its run begins: the logs of a launcher or a scheduler, and what a
# comparison notes down about the run.
BESIDE = ("log.txt", "outcome.json", "lost+found")
LOGS = (".log", ".out", ".err")

# The sections of a resolved recipe, by which the folder of a run without a mark is known.
SECTIONS = ("model", "reference", "data", "objective", "train", "rollout", "output_dir")


def refuse_foreign_files(folder: Path, stores: Sequence[str] = ()) -> None:
    """ConfigError where `folder` holds files and is no run's: what a run writes and deletes there,
    now or in a later version, must not be somebody else's. Asked before anything is loaded; hidden
    files and logs are in nobody's way.

    `stores` are paths of stored log-probs, which a run may write before it leaves its mark.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file; choose an empty or new folder")
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    own = [Path(store).expanduser().resolve() for store in stores]
    _refuse(
        folder,
        [
            entry.name
            for entry in entries
            if not _is_in_nobodys_way(entry)
            and not any(store.is_relative_to(entry) for store in own)
        ],
    )


def refuse_to_write_over(folder: Path) -> None:
    """ConfigError where `folder` is no run's and has a file of a name that a run writes; for a run
    that may have written others by now, such as a store of the reference.
    """
    _refuse(folder, [name for name in WRITTEN if (folder / name).exists()])


def _refuse(folder: Path, names: Sequence[str]) -> None:
    if names and not _is_a_run(folder):
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ConfigError(
            f"output_dir {folder} is not the folder of a run, and it holds {shown}, which could be "
            "overwritten; choose an empty or new folder"
        )


def _is_in_nobodys_way(entry: Path) -> bool:
    return entry.name.startswith(".") or entry.name in BESIDE or entry.suffix in LOGS


def _is_a_run(folder: Path) -> bool:
    """Whether the folder belongs to a run, also of a version that wrote no mark: it has whole
    checkpoints, or a resolved recipe beside its metrics.
    """
    if _has_mark(folder):
        return True
    if any(verdict.reason is None for verdict in checkpoint.verify(folder / "checkpoints")):
        return True

    recipe = folder / "recipe.yaml"
    if not (recipe.is_file() and (folder / "metrics.jsonl").is_file()):
        return False
    lines = recipe.read_text(encoding="utf-8", errors="replace").splitlines()
    return {line.partition(":")[0] for line in lines}.issuperset(SECTIONS)


def _has_mark(folder: Path) -> bool:
    try:
        content = files.json_object((folder / MARK).read_bytes())
    except OSError:
        return False
    return content is not None and "alignkit" in content
