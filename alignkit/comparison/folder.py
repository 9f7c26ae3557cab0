"""The folder of a comparison: whose files are in it, and links that nothing may be written through.
Imports no torch.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from alignkit.errors import ConfigError, ResourceError
from alignkit.files import write_json, writing

MARK = "comparison.json"
CONTENT = {"alignkit": "comparison", "format": 1}


def check_folder(folder: Path) -> None:
    """Refuse a folder in which a comparison would overwrite what is not its own.

    ConfigError unless the folder is missing, empty or a comparison of ours; ResourceError for a
    symbolic link anywhere in it, because what is written or deleted there would be elsewhere.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file; choose an empty or new folder")
    if not folder.is_dir():
        return

    visible = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    if visible and not _is_comparison(folder):
        shown = ", ".join(visible[:5]) + (", ..." if len(visible) > 5 else "")
        raise ConfigError(
            f"output_dir {folder} holds files that no comparison wrote ({shown}), and they could "
            "be overwritten; choose an empty or new folder"
        )
    for link in _links(folder):
        raise ResourceError(
            f"{link} is a symbolic link, which a comparison does not follow; remove it, or choose "
            "another output_dir"
        )


def mark_folder(folder: Path) -> None:
    """Say that the folder is a comparison's. ResourceError where the disk refuses."""
    with writing(folder / MARK):
        write_json(folder / MARK, CONTENT)


def _is_comparison(folder: Path) -> bool:
    """Whether a comparison wrote the folder; those of earlier versions have no mark, but runs with
    an outcome, or a measured base model.
    """
    if _object(folder / MARK).get("alignkit") == "comparison":
        return True
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
