"""What defines an embedded task. Importing this imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class BaseConfig:
    """Size and training of a task's base model (alignkit.tasks.base_model)."""

    hidden: int = 96
    layers: int = 3
    heads: int = 4
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 6e-3
    seed: int = 0


class Definition(Protocol):
    """A task in one size. Its files (base model and rows) are made by `alignkit.tasks.build`."""

    @property
    def name(self) -> str:
        """What stands after `task:`."""
        ...

    @property
    def key(self) -> str:
        """The cache's name for the files: a hash of everything that shapes them."""
        ...

    @property
    def judge(self) -> Callable[..., Any] | None:
        """judge(prompts, first, second) -> Verdict, where the task has one."""
        ...

    @property
    def reward(self) -> Callable[..., list[float]] | None:
        """reward(prompts, completions, **columns) -> one number per completion, in TRL's signature;
        None where an environment gives it.
        """
        ...
