"""Builds a task in a process of its own, so that the run that needs it keeps its random state, its
accelerator and its ranks.
"""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from alignkit.errors import ResourceError

STDERR = 2  # the descriptor: sys.stderr may be a notebook's or a test's, which has none
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_apart(name: str, folder: Path) -> None:
    """Build the task `name` in `folder`. Its output goes to stderr; ResourceError when it fails."""
    print(
        f"making the task `{name}` (base model and rows; once, under a minute) ...",
        file=sys.stderr,
        flush=True,
    )
    environment = {
        k: v for k, v in os.environ.items() if k not in LAUNCHED and not k.startswith("ACCELERATE_")
    }
    package = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (package, environment.get("PYTHONPATH")))
    )
    command = [sys.executable, "-m", "alignkit.tasks.worker", name, str(folder)]
    code = subprocess.run(command, env=environment, stdout=STDERR, check=False).returncode
    if code:
        raise ResourceError(
            f"the task `{name}` could not be made (its process ended with exit code {code}); see its output above"
        )


if __name__ == "__main__":
    from alignkit.tasks import TASKS

    import_module(TASKS[sys.argv[1]]).WORLDS[sys.argv[1]].build(Path(sys.argv[2]))
