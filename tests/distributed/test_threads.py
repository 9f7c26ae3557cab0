"""The way in which OpenMP's threads wait is set before torch reads it."""

import os
import subprocess
import sys

import pytest

# Runs the command line up to the first import of torch and prints what torch would read.
WATCHED = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def spins_at_import(*command, **settings):
    """GOMP_SPINCOUNT when the program first imports torch, in an environment with `settings`."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *command],
        env={**plain, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


COMMAND = ("alignkit/__main__.py", "verify", "ipo")
DEMO = ("examples/demo.py",)


@pytest.mark.parametrize("program", [COMMAND, DEMO])
def test_the_setting_stands_before_torch_is_imported(program, root):
    assert spins_at_import(str(root / program[0]), *program[1:]) == "1000"


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
        ({"KMP_BLOCKTIME": "200"}, "None"),
    ],
)
def test_a_users_own_setting_stays(settings, left, root):
    assert spins_at_import(str(root / COMMAND[0]), *COMMAND[1:], **settings) == left


@pytest.fixture
def root(request):
    return request.config.rootpath
