"""A cache of folders that are made once: locked while they are made, renamed into place when they
are whole.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from alignkit.errors import ResourceError


def cache_root() -> Path:
    """$ALIGNKIT_CACHE, else ~/.cache/alignkit."""
    return (
        Path(os.environ.get("ALIGNKIT_CACHE") or Path.home() / ".cache" / "alignkit")
        .expanduser()
        .resolve()
    )


def cached_folder(key: str, build: Callable[[Path], None]) -> Path:
    """The folder `key` of the cache; `build` fills it if it is not there yet.

    `build` gets an empty folder beside the final one. A folder that bears its final name is whole:
    the rename is the last act, a build that fails or is killed leaves nothing that is ever read. Of
    several processes one builds, the others wait. Errors: ResourceError when the cache cannot be
    written; what `build` raises goes through.
    """
    root = cache_root()
    folder = root / key
    if folder.is_dir():
        return folder
    with _locked(root, key):
        if folder.is_dir():
            return folder
        for left in root.glob(
            f".{key}.*.part"
        ):  # by a build that was killed: the lock is ours, so nobody writes there now
            shutil.rmtree(left, ignore_errors=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{key}.", suffix=".part", dir=root))
        try:
            build(beside)
            beside.chmod(0o755)
            beside.rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder


@contextmanager
def _locked(root: Path, key: str) -> Iterator[None]:
    """The operating system's lock: a killed process leaves none behind."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = os.open(root / f".{key}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ResourceError(
            f"cannot write to the cache {root}: {error.strerror}; set ALIGNKIT_CACHE to another folder"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
