"""What a checkpoint holds of a run, bit for bit: weights and moving anchors, moments, the rollout
in use, random numbers.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from alignkit.policies.dtensors import like
from alignkit.policies.pair import PolicyPair
from alignkit.policies.slices import StoredTensors
from alignkit.sources.base import Source
from alignkit.training.checkpoint import Checkpoint

Groups = dict[str, dict[str, Tensor]]


@dataclass
class Counters:
    """Figures that a run carries from step to step."""

    elapsed: float = 0.0  # seconds since the first step began
    tokens: int = 0  # computed, over all ranks
    skipped: int = 0  # steps that were not finite and were left out
    metric: str = ""  # which one is watched; "" as long as none was
    best: float = math.inf  # of the watched metric, signed so that less is better
    best_step: int | None = None
    worse: int = 0  # evaluations in a row without improvement
    evaluated: dict[str, float] = field(default_factory=dict)  # the last evaluation

    def is_best(self, metric: str, value: float, step: int) -> bool:
        """Whether `value`, of which less is better, is the best so far of this metric; what a run
        found best by another one, before it was resumed, does not count.
        """
        if self.metric not in ("", metric):
            self.best = math.inf
            self.best_step = None
            self.worse = 0
        self.metric = metric

        if not value < self.best:  # a value that is not a number is no improvement
            self.worse += 1
            return False
        self.best = value
        self.best_step = step
        self.worse = 0
        return True


@dataclass
class Snapshot:
    """The parts of a run that change, to be captured and put back together."""

    pair: PolicyPair
    optimizer: torch.optim.Optimizer
    source: Source
    average: dict[str, Tensor]  # weight average of the policy; empty without one
    counters: Counters
    accelerator: Accelerator
    reset: dict[str, Tensor]  # of `ElasticReset`; empty without one

    def capture(self) -> tuple[Groups, dict[str, Any]]:
        """Tensors by group, shards among them, and JSON. Called on every rank: rollouts and random
        numbers are gathered.
        """
        rollout, source = self.source.state()
        moments, groups = optimizer_state(self.optimizer)
        numbers, rng = self._random_states()

        tensors = {
            "policy": self.pair.tensors(),
            "optimizer": moments,
            "source": rollout,
            "average": self.average,
            "reset": self.reset,
            "rng": numbers,
        }
        state = {
            "optimizer": groups,
            "source": source,
            "rng": rng,
            "counters": asdict(self.counters),
        }
        return {group: content for group, content in tensors.items() if content}, state

    def restore(self, found: Checkpoint) -> None:
        """Put back what a checkpoint of any number of processes holds."""
        tensors = found.tensors
        state = found.state
        self.pair.load_state(tensors["policy"])
        load_optimizer_state(self.optimizer, tensors.get("optimizer", {}), state["optimizer"])
        self.source.load_state(tensors.get("source", {}), state["source"])
        for name, value in self.average.items():
            tensors["average"].stored(name).read_into(value)
        for name, value in self.reset.items():
            tensors["reset"].stored(name).read_into(value)

        # A rank that the checkpoint does not know goes on with the first one's random numbers.
        rank = (
            self.accelerator.process_index
            if self.accelerator.process_index < len(state["rng"])
            else 0
        )
        mine = {
            k.partition(".")[2]: v for k, v in tensors["rng"].items() if k.startswith(f"{rank}.")
        }
        set_random_state(mine, state["rng"][rank])

        for name, value in state["counters"].items():
            setattr(self.counters, name, value)

    def _random_states(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        everyone = gather_object([random_state()])
        return {
            f"{rank}.{k}": v
            for rank, (tensors, _) in enumerate(everyone)
            for k, v in tensors.items()
        }, [state for _, state in everyone]


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's generators, which rewards
    and judges of a user's own may draw from.
    """
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of python's, numpy's, torch's and the device's generators as tensors and JSON."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(numbers),
        "numpy": torch.from_numpy(numpy.asarray(keys).astype("int64")),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {"python": [version, gauss], "numpy": [kind, *rest]}


def set_random_state(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """The inverse of `random_state`."""
    version, gauss = state["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    kind, *rest = state["numpy"]
    numpy.random.set_state((kind, tensors["numpy"].numpy().astype("uint32"), *rest))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def optimizer_state(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as flat tensors ("0.exp_avg"), shards among them, and JSON (groups
    without parameters, scalar entries).
    """
    content = optimizer.state_dict()
    tensors = {
        f"{i}.{k}": v
        for i, entry in content["state"].items()
        for k, v in entry.items()
        if isinstance(v, Tensor)
    }
    scalars = {
        f"{i}.{k}": v
        for i, entry in content["state"].items()
        for k, v in entry.items()
        if not isinstance(v, Tensor)
    }
    return tensors, {"scalars": scalars, "groups": content["param_groups"]}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """The inverse of `optimizer_state`; of a checkpoint's tensors, a shard is read alone."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries: dict[int, dict[str, Any]] = {}
    for key in tensors:
        index, name = key.split(".", 1)
        parameter = parameters[int(index)].detach()
        entries.setdefault(int(index), {})[name] = _moment(tensors, key, parameter)
    for key, value in state["scalars"].items():
        index, name = key.split(".", 1)
        entries.setdefault(int(index), {})[name] = value

    groups = [
        {k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in state["groups"]
    ]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def _moment(tensors: Mapping[str, Tensor], key: str, parameter: Tensor) -> Tensor:
    """One tensor of an optimiser's state, laid out as its parameter is."""
    if not isinstance(tensors, StoredTensors):
        return like(tensors[key], parameter)
    stored = tensors.stored(key)
    if stored.shape != parameter.shape:
        return stored.whole()
    moment = torch.zeros_like(parameter, dtype=stored.dtype)
    stored.read_into(moment)
    return moment
