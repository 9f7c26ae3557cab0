"""Which isolation is chosen where, and how folders are opened to another user."""

import os
import subprocess
import sys
import tempfile

import pytest

from alignkit.distributed import isolation
from alignkit.distributed.confinement import let_in


def offered(monkeypatch, *, root, working):
    """What is chosen where only commands with these words work."""
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)

    def works(prefix, **identity):
        words = {*prefix, "another user"} if identity else set(prefix)
        return words <= working

    monkeypatch.setattr(isolation, "_works", works)
    isolation._offered.cache_clear()
    try:
        return isolation.choose()
    finally:
        isolation._offered.cache_clear()


IDS = (1000, os.getegid() or 61184, 61184)
PROCESSES = {"unshare", *isolation._NEW_PROCESSES}
USERS = {*PROCESSES, "--user", *(f"--map-{kind}={n}" for kind in ("user", "group") for n in IDS)}


@pytest.mark.parametrize(
    ("root", "working", "kind", "first"),
    [
        (True, {"another user", *PROCESSES, "--mount-proc"}, "user", "unshare"),
        (True, {"another user", *PROCESSES}, "user", "unshare"),
        (True, {"another user"}, "user", None),
        (True, {*USERS}, "namespace", "unshare"),  # a container that may not change users
        (False, {*USERS, "--mount-proc"}, "namespace", "unshare"),
        (False, {*USERS}, "namespace", "unshare"),
        (False, set(isolation._BUBBLEWRAP), "bubblewrap", "bwrap"),
        (False, set(), "none", None),
    ],
)
def test_the_strongest_kind_that_works_is_chosen(monkeypatch, root, working, kind, first):
    chosen = offered(monkeypatch, root=root, working=working)
    assert chosen.kind == kind
    assert chosen.prefix[:1] == ((first,) if first else ())
    assert (chosen.user is not None) == (kind == "user")
    assert chosen.own_mounts == (kind == "user" and "--mount-proc" in working)


def test_two_workers_have_two_users(monkeypatch):
    monkeypatch.setattr(isolation, "_offered", lambda: ("user", ()))
    numbers = iter([5, 9])
    monkeypatch.setattr(isolation.secrets, "randbelow", lambda most: next(numbers))
    assert [isolation.choose().user for _ in range(2)] == [61189, 61193]


def test_closed_folders_are_named_where_they_cannot_be_opened(tmp_path):
    private = tmp_path / "private"
    (private / "code").mkdir(parents=True)
    (private / "open.py").touch()

    # pytest's own folders are closed to others, at several levels.
    for folder in (tmp_path, *tmp_path.parents):
        if folder.is_relative_to(tempfile.gettempdir()) and folder.stat().st_mode & 0o077 == 0:
            folder.chmod(0o755)
    private.chmod(0o700)
    needed = [private / "code", private / "open.py", tmp_path, tmp_path / "absent"]
    assert let_in(needed, own_mounts=False) == [private / "code", private / "open.py"]


OPENS = """
import os, sys
from pathlib import Path
from alignkit.distributed.confinement import let_in
private = Path(sys.argv[1])
closed = let_in([private / "code", private / "code" / "deep", private / "file.py"], own_mounts=True)
assert closed == [], closed
os.setresuid(61190, 61190, 61190)
print((private / "code" / "deep" / "a.txt").read_text(), (private / "file.py").read_text())
print(sorted(os.listdir(private)))
"""


@pytest.mark.skipif(not isolation.choose().own_mounts, reason="needs root and mount namespaces")
def test_root_opens_what_is_needed_and_nothing_beside_it(tmp_path):
    private = tmp_path / "private"
    (private / "code" / "deep").mkdir(parents=True)
    (private / "code" / "deep" / "a.txt").write_text("deep")
    (private / "file.py").write_text("file")
    (private / "secret").write_text("secret")
    for folder in (tmp_path.parent.parent, tmp_path.parent, tmp_path):
        folder.chmod(0o755)
    private.chmod(0o700)

    command = [*isolation.choose().prefix, sys.executable, "-c", OPENS, str(private)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.stderr == ""
    assert ran.stdout == "deep file\n['code', 'file.py']\n"
    assert (private / "secret").read_text() == "secret"  # seen by the worker alone
