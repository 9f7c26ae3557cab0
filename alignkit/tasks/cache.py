"""A cache of folders that are made once: locked while they are
made, renamed into place when they are whole.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from alignkit import files
from alignkit.errors import ResourceError


def cache_root() -> Path:
    """$ALIGNKIT_CACHE, else ~/.cache/alignkit."""
    root = os.environ.get("ALIGNKIT_CACHE") or Path.home() / ".cache" / "alignkit"
    return Path(root).expanduser().resolve()


def cached_folder(key: str, build: Callable[[Path], None]) -> Path:
    """The folder `key` of the cache; `build` fills it if it is not there yet.

    `build` gets an empty folder beside the final one. A folder that bears its final name is whole:
    the rename is the last act, and a build that fails or is killed leaves nothing that is ever
    read. Of several processes one builds while the others wait. Errors: ResourceError when the
    cache cannot be written; what `build` raises goes through.
    """
    root = cache_root()
    folder = root / key
    if folder.is_dir():
        return folder

    with ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.locked(root / f".{key}.lock"))
        except OSError as error:
            raise ResourceError(
                f"cannot write to the cache {root}: {error.strerror}; "
                "set ALIGNKIT_CACHE to another folder"
            ) from error

        if not folder.is_dir():  # another process may have made it while this one waited
            build(stack.enter_context(files.replaced_folder(folder)))
    return folder
