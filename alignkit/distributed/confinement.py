"""The walls themselves: called in a worker, and in the process that runs code of a completion.

Linux only where it says so; elsewhere those calls do nothing.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

# Numbers of Linux's prctl(2) and mount(2).
_DUMPABLE = 4
_SUBREAPER = 36
_NO_NEW_PRIVILEGES = 38
_BIND_ALL = 4096 | 16384

_PROCESSES = 64 + 4 * (os.cpu_count() or 1)  # processes and threads that one completion may have
_ENDING = 5.0  # seconds for killed processes to end
_PAUSE = 0.002  # seconds between two looks at them


def hide_process() -> None:
    """Close this process's environment, memory and descriptors to
    its user's other processes (Linux).
    """
    _prctl(_DUMPABLE, 0)


def adopt_orphans() -> None:
    """Become the parent of every descendant that loses its own, so
    that `end_all` finds it (Linux).
    """
    _prctl(_SUBREAPER, 1)


def volunteer_for_out_of_memory() -> None:
    """Let the kernel end this process, or those that it starts, before the run (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def processes_of_user() -> int:
    """Processes and threads of this process's user, which RLIMIT_NPROC counts together (Linux)."""
    count = 0
    for threads in Path("/proc").glob("[0-9]*/task"):
        with contextlib.suppress(OSError):
            if threads.parent.stat().st_uid == os.geteuid():
                count += len(os.listdir(threads))
    return count


def confine(user: int | None, memory_mb: int, taken: int) -> None:
    """Give up what the code of a completion must not have; called where it is about to run.

    user       the id to become, None to stay who one is
    memory_mb  MiB of address space of each process, and the size of the largest file
    taken      processes that the run's own user has anyway, by `processes_of_user`
    """
    os.setsid()
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        taken = 0
    _prctl(_NO_NEW_PRIVILEGES, 1)
    hide_process()

    size = memory_mb << 20
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, size)
    _limit(resource.RLIMIT_FSIZE, size)
    _limit(resource.RLIMIT_NPROC, taken + _PROCESSES)


def end_all(child: int | None, user: int | None) -> int:
    """Kill `child` and everything that it has started, orphans too; returns its wait status.

    child  None: everything that earlier ones have left
    user   the id that it ran under, None for this process's own

    Gives up after a few seconds on a process that the kernel does not let go.
    """
    status = 0
    until = time.monotonic() + _ENDING
    while _kill_the_rest(user) and time.monotonic() < until:
        # Killed is not ended yet: as parent or adoptive parent, wait for each of them.
        ended = -1
        while ended:
            try:
                ended, ended_with = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if ended == child:
                status = ended_with
        time.sleep(_PAUSE)
    return status


def _kill_the_rest(user: int | None) -> bool:
    """Kill what completions have started; False where nothing of it is left."""
    if os.getpid() == 1:  # the first of a process namespace: everything in it
        return _kill(-1)
    if user is not None:
        _kill_all_of(user)
        return any(_runs_as(user, process) for process in _descendants(os.getpid()))
    family = _descendants(os.getpid())
    for process in family:
        _kill(process)
    return bool(family)


def parents_of_all() -> set[int]:
    """Ids of the processes that have children (Linux)."""
    return set(_children_of_all())


def end_child(child: int, others: Sequence[int]) -> None:
    """Kill `child` and every descendant of this process that is neither one of `others` nor
    descends from one; gives up after a few seconds on what the kernel does not let go.
    """
    _kill(child)
    os.waitpid(child, 0)
    if os.readlink("/proc/self") != str(os.getpid()):  # it shows another namespace's processes
        return

    until = time.monotonic() + _ENDING
    while time.monotonic() < until:
        spared = {*others, *(process for other in others for process in _descendants(other))}
        strangers = [process for process in _descendants(os.getpid()) if process not in spared]
        for process in strangers:
            _kill(process)
        if not strangers:
            return

        for process in strangers:  # killed is not ended yet: wait for those that are its children
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, os.WNOHANG)
        time.sleep(_PAUSE)


def let_in(paths: Iterable[str | Path], *, own_mounts: bool) -> list[Path]:
    """Make `paths` readable for other users; returns those that are not.

    With `own_mounts` (root, in a mount namespace that nobody else sees) a folder on the way that is
    closed to others is covered by an empty one, in which the paths below it appear again.
    """
    behind: dict[Path, set[Path]] = {}
    for path in {Path(path).resolve() for path in paths}:
        closed = _closed_to_others(path)
        if closed is not None:
            behind.setdefault(closed, set()).add(path)
    if not own_mounts:
        return sorted(path for hidden in behind.values() for path in hidden)

    for closed, hidden in behind.items():
        if closed not in hidden:
            _uncover(closed, hidden)
    return sorted(
        path for hidden in behind.values() for path in hidden if _closed_to_others(path) is not None
    )


def _uncover(closed: Path, hidden: set[Path]) -> None:
    """Mount an empty folder over `closed`, and in it the folders `hidden` where they were."""
    outermost = [path for path in hidden if not hidden.intersection(path.parents)]
    handles = {path: os.open(path, os.O_PATH) for path in outermost}
    _mount("tmpfs", closed, "tmpfs", 0, "mode=755,size=1m")

    for path, handle in handles.items():
        source = Path(f"/proc/self/fd/{handle}")
        if source.is_dir():
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        _mount(str(source), path, None, _BIND_ALL, None)
        os.close(handle)


def _closed_to_others(path: Path) -> Path | None:
    """The first folder on the way that other users may not enter, or `path` if they may not read
    it; None also where there is no such path.
    """
    for step in [*reversed(path.parents), path]:
        try:
            mode = step.stat().st_mode
        except OSError:
            return None
        enter = 0o001 if step.is_dir() else 0
        read = 0o004 if step == path else 0
        if mode & (enter | read) != enter | read:
            return step
    return None


def _descendants(ancestor: int) -> list[int]:
    """Process ids of the children of `ancestor`, of their children, and so on (Linux)."""
    children = _children_of_all()
    waiting = [ancestor]
    below = []
    while waiting:
        direct = children.get(waiting.pop(), [])
        below += direct
        waiting += direct
    return below


def _children_of_all() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.parent.name))
    return children


def _kill(process: int) -> bool:
    """False where there is no such process."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return False
    except PermissionError:
        return process != -1
    return True


def _kill_all_of(user: int) -> None:
    """Kill every process of `user` at once, by a process of the same user."""
    helper = os.fork()
    if helper == 0:
        try:
            os.setresuid(user, user, user)
            _kill(-1)
        finally:
            os._exit(0)
    os.waitpid(helper, 0)


def _runs_as(user: int, process: int) -> bool:
    """Whether `process` has this user id (Linux)."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return any(line.split()[:2] == ["Uid:", str(user)] for line in lines)
    return False


def _limit(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _mount(source: str, target: Path, kind: str | None, flags: int, data: str | None) -> None:
    texts = [None if text is None else text.encode() for text in (source, kind, data)]
    library = ctypes.CDLL(None, use_errno=True)
    place = os.fsencode(target)
    if library.mount(texts[0], place, texts[1], ctypes.c_ulong(flags), texts[2]) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))
