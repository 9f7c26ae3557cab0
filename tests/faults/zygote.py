"""Runs the command line in forked children, one after the other, so that a run to be killed starts
in milliseconds.

Reads one JSON list of arguments per line; answers with the child's process id, and with how it
ended (negative: the signal).
"""

import json
import os
import sys

import torch

import alignkit.runs.job_data
import alignkit.runs.launch
import alignkit.sources.rollouts  # noqa: F401
from alignkit.cli.main import main
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.config.train import TrainConfig
from alignkit.objectives.preference.dpo import DPO
from alignkit.policies.load import load_pair
from alignkit.training.optimizer import make_optimizer


def child(arguments: list[str], log: int) -> None:
    """Never returns."""
    os.dup2(log, 1), os.dup2(log, 2)
    code = 70
    try:
        main(arguments)
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def warm_up(model: str) -> None:
    """Everything that a run imports on its way. No backward: autograd's threads do not survive a
    fork.
    """
    load_pair(
        ModelConfig(name_or_path=model),
        ReferenceConfig(kind="frozen"),
        None,
        DPO().plan,
        fixed_data=True,
    )
    make_optimizer(TrainConfig(), [torch.nn.Parameter(torch.zeros(2, 2))])


if __name__ == "__main__":
    torch.set_num_threads(1)
    warm_up(sys.argv[2])
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line), log)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
