"""Builds a task in a process of its own, so that the run that needs it keeps its random state, its
accelerator and its ranks.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

from alignkit.errors import ResourceError

log = logging.getLogger("alignkit")

STDERR = 2  # the descriptor: sys.stderr may be a notebook's or a test's, which has none

# What tells a process that it is one rank of several.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_apart(name: str, folder: Path, teacher_of: Path | None = None) -> None:
    """Build the task `name` in `folder`, or the teacher of the task whose files are in
    `teacher_of`. Its output goes to stderr; ResourceError when it fails.
    """
    what = "base model and rows" if teacher_of is None else "teacher"
    # A warning, so that programs that have set up no logging see why they wait.
    log.warning("making the task `%s` (%s; once, about a minute) ...", name, what)

    environment = {
        variable: value
        for variable, value in os.environ.items()
        if variable not in LAUNCHED and not variable.startswith("ACCELERATE_")
    }
    # The child must find the same alignkit, even if this one was not installed.
    paths = [str(Path(__file__).resolve().parents[2]), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

    command = [sys.executable, "-m", "alignkit.tasks.build", name, str(folder)]
    if teacher_of is not None:
        command.append(str(teacher_of))
    code = subprocess.run(command, env=environment, stdout=STDERR, check=False).returncode
    if code:
        raise ResourceError(
            f"the task `{name}` could not be made (its process ended with exit code {code}); "
            "see its output above"
        )
