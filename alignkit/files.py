"""Files as a training run needs them: whole or not there, synced, locked and hashed.

Standard library only.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from alignkit.errors import ResourceError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1

# What `flock` answers for a folder on a file system that locks files only, such as NFS.
NO_FOLDER_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOTSUP)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of several files, in their order; large files are read side by side."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(sha256_of_file, paths))


def sha256_of_parts(parts: Iterable[bytes]) -> str:
    """SHA-256 of some bytes under one another, in hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """SHA-256 of a JSON value, in hex; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def vocabulary_hash(vocabulary: Mapping[str, int]) -> str:
    """Hash of a tokenizer's vocabulary, ids included."""
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path`. Readers see the old text or the new one, whole; OSError where
    the disk refuses.
    """
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """`write_text` of a JSON value. ValueError for numbers that are not finite: JSON has none."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def write_jsonl(
    path: Path, rows: Sequence[Mapping[str, Any]], *, ensure_ascii: bool = False
) -> None:
    """`write_text` of one JSON object per line. With `ensure_ascii`, other characters are written
    as escapes: text that is not valid Unicode needs that.
    """
    lines = [json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in rows]
    write_text(path, "".join(lines))


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON object as a line. OSError where `path` is a link: it may lead anywhere."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def json_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Every line of a JSONL file with the object in it; None for a line that holds none.

    A process that is killed may leave half a line, a damaged disk lines that are not UTF-8.
    Nothing comes where there is no file.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            yield line, json_object(line)


def json_object(text: bytes) -> dict[str, Any] | None:
    """The JSON object that `text` is, None where it is none."""
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file that this package wrote; none where there is no file. Lines that
    hold no JSON object are left out.
    """
    return [row for _, row in json_lines(path) if row is not None]


def check_no_link(path: Path) -> None:
    """OSError where `path` is a symbolic link: what is written or
    deleted there would be elsewhere.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"{path.name} is a symbolic link, which is not followed", path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk refuses inside the block into a ResourceError that names `path`.

    A full disk, one without inodes, a folder that may not be written to: libraries written in Rust
    raise errors of their own for these.
    """
    try:
        yield
    except Exception as error:
        reason = refusal_of_disk(error)
        if reason is None:
            raise
        raise ResourceError(
            f"cannot write {path}: {reason}; free space or name another place, then run the "
            "command again"
        ) from error


def refusal_of_disk(error: BaseException) -> str | None:
    """What the disk refused, in words; None for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors: "I/O error: ...", tokenizers: a bare Exception; both end in "(os error 28)"
    text = str(error)
    by_rust = type(error).__name__ == "SafetensorError" or "(os error " in text
    return text.strip().partition("\n")[0] if by_rust else None


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends without an exception.

    Readers see the old file or the new one, whole; an exception leaves `path` as it was. OSError
    where the disk refuses, or where a link stands in the place of the temporary file.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    check_no_link(temporary)
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder`
    when the block ends without an exception.

    Every file in it is synced before the rename. What an earlier, killed attempt left is removed
    first; an exception leaves `folder` as it was. OSError where the disk refuses, or where a link
    stands in the place of a temporary folder.
    """
    try:
        temporary = begun_folder(folder)
        yield temporary
        for path in temporary.rglob("*"):
            fsync(path)
        appear(temporary, folder)
    finally:
        abandon_folder(folder)


def begun_folder(folder: Path) -> Path:
    """An empty folder that can later `appear` in the place of `folder`; what an earlier, killed
    attempt left is removed. OSError where the disk refuses, or where a link stands in its place.
    """
    temporary = folder.with_name(f".tmp-{folder.name}")
    for left_over in (temporary, folder.with_name(f".tmp-{folder.name}-old")):
        check_no_link(left_over)
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def appear(temporary: Path, folder: Path) -> None:
    """Let a folder whose files are synced take the place of `folder`, by one rename."""
    fsync(temporary)

    # Moved aside and not deleted in place: nobody ever sees half of it.
    if folder.exists():
        folder.rename(folder.with_name(f".tmp-{folder.name}-old"))
    temporary.rename(folder)
    fsync(folder.parent)


def abandon_folder(folder: Path) -> None:
    """Remove what has not appeared in the place of `folder`, and what was there before."""
    for left_over in (f".tmp-{folder.name}", f".tmp-{folder.name}-old"):
        shutil.rmtree(folder.with_name(left_over), ignore_errors=True)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[BinaryIO]:
    """Hold the operating system's lock on the file `path`, made if it is not there.

    A process that dies gives the lock back. Without `wait`, BlockingIOError where another process
    holds it.
    """
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield file


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the operating system's lock on a folder that exists; nothing that is deleted in it gives
    the lock away.

    Where the file system locks files only, the file `.lock` in it is locked instead.
    BlockingIOError where another process holds the lock.
    """
    with ExitStack() as stack:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in NO_FOLDER_LOCKS:
                raise
            check_no_link(folder / ".lock")
            stack.enter_context(locked(folder / ".lock", wait=False))
        yield


def write_manifest(
    folder: Path,
    content: Mapping[str, Any],
    *,
    without: Sequence[str] = (),
    hashes: Mapping[str, str] | None = None,
) -> None:
    """Write `manifest.json`: `content` (JSON), size and SHA-256 of every file in `folder` but those
    named in `without`, and a SHA-256 of all that. `hashes` are those of files that are known.
    """
    hashes = hashes or {}
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    names = [name for name in names if name not in (MANIFEST, *without)]
    unknown = [name for name in names if name not in hashes]
    computed = dict(zip(unknown, sha256_of_files([folder / name for name in unknown])))
    entries = {
        name: {"sha256": {**hashes, **computed}[name], "bytes": (folder / name).stat().st_size}
        for name in names
    }

    manifest = {"format": MANIFEST_FORMAT, **content, "files": entries}
    signed = {**manifest, "sha256": sha256_of_json(manifest)}
    (folder / MANIFEST).write_text(json.dumps(signed, indent=1))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, {} where it has none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def check_manifest(folder: Path) -> str | None:
    """None if every file matches the folder's manifest, else the first thing that is wrong. Files
    that the manifest does not name are nobody's business.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] > MANIFEST_FORMAT:
            return (
                f"format {manifest['format']} is newer than this version reads ({MANIFEST_FORMAT})"
            )
        if manifest.pop("sha256") != sha256_of_json(manifest):
            return f"{MANIFEST} does not match its own SHA-256"

        entries = manifest["files"].items()
        reasons = (_check_size(folder, name, entry) for name, entry in entries)
        reason = next((reason for reason in reasons if reason), None)
        return reason or _check_hashes(folder, manifest["files"])
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{Path(error.filename or MANIFEST).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"


def _check_size(folder: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with one file of a manifest before its content is read, if anything is."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return f"manifest names a file outside the folder: {name}"

    file = folder / name
    if not file.is_file():
        return f"{name} is missing"
    if file.stat().st_size != entry["bytes"]:
        return f"{name} has {file.stat().st_size} bytes, the manifest says {entry['bytes']}"
    return None


def _check_hashes(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> str | None:
    hashes = sha256_of_files([folder / name for name in entries])
    for (name, entry), sha256 in zip(entries.items(), hashes):
        if entry["sha256"] != sha256:
            return f"{name} does not match its SHA-256"
    return None


def cache_root() -> Path:
    """$ALIGNKIT_CACHE, else alignkit/ in $XDG_CACHE_HOME or ~/.cache."""
    given = os.environ.get("ALIGNKIT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given or Path(base) / "alignkit").expanduser().resolve()


def cached_folder(
    key: str,
    build: Callable[[Path], None],
    damage: Callable[[Path], str | None] = lambda folder: None,
) -> Path:
    """The folder `key` of the cache; `build` fills it if it is not there, or if `damage` says what
    is wrong with it.

    `build` gets an empty folder beside the final one. A folder that bears its final name is whole:
    the rename is the last act, and a build that fails or is killed leaves nothing that is ever
    read. Of several processes one builds while the others wait. Errors: ResourceError when the
    cache cannot be written; what `build` raises goes through.
    """
    folder = cache_root() / key
    if folder.is_dir() and damage(folder) is None:
        return folder

    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder.with_name(f".{folder.name}.lock")))
        except OSError as error:
            raise ResourceError(
                f"cannot write to the cache {cache_root()}: {error.strerror}; "
                "set ALIGNKIT_CACHE to another folder"
            ) from error

        # Another process may have made it while this one waited.
        if not folder.is_dir() or damage(folder) is not None:
            build(stack.enter_context(replaced_folder(folder)))
    return folder
