"""What a person sees while a run goes on: a progress bar with an ETA on a terminal, a line now and
then in a log.
"""

import time
from collections.abc import Mapping
from contextlib import ExitStack

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from alignkit.training.messages import shown_messages

SHOWN = ("loss", "eval_loss", "reward", "kl", "rewards/accuracies", "rewards/margins", "grad_norm")


class TrainProgress:
    """Use as a context manager; silent on ranks that do not write.

    Inside the context the messages of the package's logger are shown too, above the bar where there
    is one.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        enabled: bool = True,
        console: Console | None = None,
        every: float = 10.0,
    ):
        self.console = console or Console(stderr=True)
        self.total = total
        self.start = start
        self.enabled = enabled
        self.every = every
        self.began = self.printed = time.monotonic()
        self.bar: Progress | None = None
        self._messages = ExitStack()

    def __enter__(self) -> "TrainProgress":
        if self.enabled:
            self._messages.enter_context(shown_messages())

        if self.enabled and self.console.is_terminal:
            columns = (
                TextColumn("[bold]train"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
            )
            self.bar = Progress(
                *columns,
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}", markup=False),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task(
                "train", total=self.total, completed=self.start, metrics=""
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
        self._messages.close()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` steps are done."""
        if not self.enabled:
            return

        shown = "  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)
        if self.bar:
            self.bar.update(self.task, completed=step, metrics=shown)
            return

        now = time.monotonic()
        if now - self.printed >= self.every or step == self.total:
            self.printed = now
            rest = (now - self.began) / max(1, step - self.start) * (self.total - step)
            self.console.print(
                f"step {step}/{self.total}  {shown}  ETA {rest:.0f} s",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
