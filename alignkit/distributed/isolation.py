"""What this machine offers to keep code that a model wrote apart from the run.

`choose` is asked by the run, before it starts a worker. The worker's side is confinement.py;
docs/reliability.md says what each kind keeps apart and what it does not.
"""

import functools
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

_FIRST_USER = 61184  # user ids that systemd keeps for services which come and go, up to 65519
_USERS = 4336
_PROBE_SECONDS = 20.0

_NEW_PROCESSES = ("--pid", "--fork", "--kill-child")
_MOUNTS = "--mount-proc"  # a mount namespace too, with a /proc that shows no other processes
_BUBBLEWRAP = (
    *("bwrap", "--dev-bind", "/", "/", "--proc", "/proc", "--unshare-pid", "--as-pid-1"),
    *("--cap-drop", "ALL"),
)

Kind = Literal["user", "namespace", "bubblewrap", "none"]


@dataclass(frozen=True)
class Isolation:
    """How the code of completions is kept apart from the run.

    kind    `user`: a user of its own; `namespace` or `bubblewrap`: the run's user in a process
            namespace of its own; `none`: this machine offers none of them
    prefix  what comes before the worker's command, so that it starts inside its namespaces
    user    the id of the user that runs the code, None for the run's own
    """

    kind: Kind
    prefix: tuple[str, ...] = ()
    user: int | None = None

    @property
    def own_mounts(self) -> bool:
        """Whether root's worker may change what is mounted where, seen by itself alone."""
        return self.kind == "user" and _MOUNTS in self.prefix


def choose() -> Isolation:
    """The strongest isolation of this machine, with another user id at every call."""
    kind, prefix = _offered()
    user = _FIRST_USER + secrets.randbelow(_USERS) if kind == "user" else None
    return Isolation(kind, prefix, user)


@functools.cache
def _offered() -> tuple[Kind, tuple[str, ...]]:
    """Tried in this order: the first that works here."""
    as_root: tuple[tuple[str, ...], ...] = (
        ("unshare", _MOUNTS, *_NEW_PROCESSES),
        ("unshare", *_NEW_PROCESSES),
        (),
    )
    if os.geteuid() == 0 and _works([], user=_FIRST_USER, group=_FIRST_USER, extra_groups=[]):
        return "user", next(prefix for prefix in as_root if not prefix or _works(prefix))

    own_users = user_namespace()
    for prefix in ((*own_users, _MOUNTS, *_NEW_PROCESSES), (*own_users, *_NEW_PROCESSES)):
        if _works(prefix):
            return "namespace", prefix
    return ("bubblewrap", _BUBBLEWRAP) if _works(_BUBBLEWRAP) else ("none", ())


def user_namespace() -> tuple[str, ...]:
    """The command that keeps the run's user but none of its rights over other processes. Root gets
    another number inside, since number 0 would have rights there.
    """
    user = os.geteuid() or _FIRST_USER
    group = os.getegid() or _FIRST_USER
    return ("unshare", "--user", f"--map-user={user}", f"--map-group={group}")


def _works(prefix: Sequence[str], **identity: Any) -> bool:
    """Whether a command runs behind `prefix`, and with this user and group."""
    if sys.platform != "linux" or (prefix and shutil.which(prefix[0]) is None):
        return False
    command = [*prefix, "true"]
    try:
        ended = subprocess.run(command, capture_output=True, timeout=_PROBE_SECONDS, **identity)
    except (OSError, subprocess.SubprocessError):
        return False
    return ended.returncode == 0
