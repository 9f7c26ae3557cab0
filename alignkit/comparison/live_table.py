"""What a person sees while a comparison is running: on a terminal a table with the time that is
left, in a log a line for each run that starts or ends.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.table import Table

from alignkit.comparison.grid import Point
from alignkit.comparison.run_state import read_run_state
from alignkit.config.escaping import plain
from alignkit.training.log_end import rows_backwards
from alignkit.training.progress import SHOWN

STYLES = {
    "failed": "bold red",
    "running": "bold",
    "measuring": "bold",
    "finished": "",
    "waiting": "dim",
}


@dataclass
class _Progress:
    """A run as its folder shows it."""

    state: str
    step: int = 0
    total_steps: int = 0
    note: str = ""  # the metrics of its last step, or why it failed
    seconds: float = 0.0


class LiveTable:
    """Use it as a context manager, and call `watch` with the points in progress whenever there may
    be something new.
    """

    def __init__(self, points: Sequence[Point], processes: int, console: Console | None = None):
        self.points = points
        self.processes = max(1, processes)
        self.console = console or Console(stderr=True)
        self.start_times: dict[str, float] = {}
        self.progress = {point.name: self._look(point, False) for point in points}
        self.live: Live | None = None

    def __enter__(self) -> "LiveTable":
        if self.console.is_terminal:
            self.live = Live(self._table(), console=self.console, refresh_per_second=2)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.update(self._table(), refresh=True)
            self.live.stop()

    def watch(self, working: Sequence[Point]) -> None:
        """Look at the folders of the points at `working`, and of those that were a moment ago."""
        names = {point.name for point in working}
        for point in self.points:
            before = self.progress[point.name]
            if point.name not in names and before.state not in ("running", "measuring"):
                continue
            now = self._look(point, point.name in names)
            self.progress[point.name] = now

            # A log has no table: it gets a line when a run starts and when it ends.
            changed = now.state != before.state
            if not self.live and changed and now.state in ("finished", "failed", "running"):
                self._print_line(point, now)
        if self.live:
            self.live.update(self._table())

    def _print_line(self, point: Point, now: _Progress) -> None:
        done = sum(seen.state in ("finished", "failed") for seen in self.progress.values())
        eta = f"  {self._eta()}" if now.state != "running" else ""
        text = f"[{done}/{len(self.points)}] {point.name}: {now.state}  {now.note}".rstrip()
        self.console.print(plain(text + eta), highlight=False, soft_wrap=True)

    def _look(self, point: Point, working: bool) -> _Progress:
        """Read a point's folder; `working` says whether a process is busy with it."""
        run = read_run_state(point)
        total = point.recipe.train.steps or 0
        if run.status == "failed":
            reason = run.reason.partition("\n")[0]
            return _Progress("failed", total_steps=total, note=reason, seconds=run.seconds)

        row = next(rows_backwards(Path(point.recipe.output_dir) / "metrics.jsonl"), {})
        note = "  ".join(f"{name} {row[name]:.3g}" for name in SHOWN if name in row)
        step = int(row.get("step", 0))
        if not working:
            state = "finished" if run.status == "finished" else "waiting"
            return _Progress(state, step, total, note, run.seconds)

        # A trained run that a process is still busy with is being measured.
        state = "measuring" if run.status == "finished" else "running"
        start = self.start_times.setdefault(point.name, time.monotonic())
        return _Progress(state, step, total, note, time.monotonic() - start)

    def _eta(self) -> str:
        """The time that is left, shared by the workers.

        A run is expected to take as long as the finished or running ones of its curve, or of all
        curves where its own has none.
        """
        durations: dict[str, list[float]] = {}
        for point in self.points:
            seen = self.progress[point.name]
            if seen.state == "finished" and seen.seconds:
                durations.setdefault(point.label, []).append(seen.seconds)
            elif seen.state == "running" and seen.step and seen.total_steps:
                whole = seen.seconds * seen.total_steps / seen.step
                durations.setdefault(point.label, []).append(whole)

        everything = [seconds for of_curve in durations.values() for seconds in of_curve]
        if not everything:
            return "ETA not known yet"

        left = 0.0
        for point in self.points:
            seen = self.progress[point.name]
            if seen.state in ("waiting", "running"):
                expected = mean(durations.get(point.label, everything))
                spent = seen.seconds if seen.state == "running" else 0.0
                left += max(0.0, expected - spent)
        return f"ETA {_duration(left / self.processes)}"

    def _table(self) -> Table:
        states = [seen.state for seen in self.progress.values()]
        counts = ", ".join(f"{states.count(state)} {state}" for state in STYLES if state in states)
        table = Table(title=plain(f"{counts}; {self._eta()}"), title_justify="left", expand=True)
        for column in ("run", "", "step", "time", ""):
            side: Literal["left", "right"] = "right" if column in ("step", "time") else "left"
            table.add_column(column, justify=side, no_wrap=True, overflow="ellipsis")

        shown = self._shown(room=max(4, self.console.height - 6))
        for point in shown:
            seen = self.progress[point.name]
            step = f"{seen.step}/{seen.total_steps}" if seen.total_steps else str(seen.step or "")
            spent = _duration(seen.seconds) if seen.seconds else ""
            style = STYLES[seen.state]
            note = plain(seen.note)
            table.add_row(plain(point.name), seen.state, step, spent, note, style=style)

        hidden = len(self.points) - len(shown)
        if hidden:
            table.add_row(f"... and {hidden} more", "", "", "", "", style="dim")
        return table

    def _shown(self, room: int) -> list[Point]:
        """As many points as the screen has `room` for; running and
        failed ones are never hidden by others.
        """
        order = ["running", "measuring", "failed", "finished", "waiting"]
        ranked = sorted(self.points, key=lambda point: order.index(self.progress[point.name].state))
        names = {point.name for point in ranked[:room]}
        return [point for point in self.points if point.name in names]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
