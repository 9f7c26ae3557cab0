"""The folder of a comparison or of rounds: whose files are in it, and links that nothing may be
written through. Imports no torch.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from alignkit.errors import ConfigError, ResourceError
from alignkit.files import write_json, writing

Kind = Literal["comparison", "iteration"]


def check_folder(folder: Path, kind: Kind = "comparison") -> None:
    """Refuse a folder in which a comparison or iteration would overwrite what is not its own.

    ConfigError unless the folder is missing, empty or one of ours of that kind; ResourceError for a
    symbolic link anywhere in it, because what is written or deleted there would be elsewhere.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file; choose an empty or new folder")
    if not folder.is_dir():
        return

    visible = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    if visible and not _is_ours(folder, kind):
        shown = ", ".join(visible[:5]) + (", ..." if len(visible) > 5 else "")
        raise ConfigError(
            f"output_dir {folder} holds files that no {kind} wrote ({shown}), and they could "
            "be overwritten; choose an empty or new folder"
        )
    for link in _links(folder):
        raise ResourceError(
            f"{link} is a symbolic link, which a {kind} does not follow; remove it, or choose "
            "another output_dir"
        )


def mark_folder(folder: Path, kind: Kind = "comparison") -> None:
    """Say whose the folder is. ResourceError where the disk refuses."""
    mark = folder / f"{kind}.json"
    with writing(mark):
        write_json(mark, {"alignkit": kind, "format": 1})


def _is_ours(folder: Path, kind: Kind) -> bool:
    """Whether a comparison or iteration wrote the folder; comparisons of earlier versions have no
    mark, but runs with an outcome, or a measured base model.
    """
    if _object(folder / f"{kind}.json").get("alignkit") == kind:
        return True
    if kind != "comparison":
        return False
    outcomes = folder.glob("runs/*/outcome.json")
    if any("settings" in _object(file) for file in outcomes):
        return True
    return {"key", "measured"} <= _object(folder / "base.json").keys()


def _links(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink():
                yield path


def _object(file: Path) -> dict[str, object]:
    """The JSON object in a file, {} where there is none."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
