"""What a person sees while a comparison goes on: a table with an ETA on a terminal, a line for each
finished run in a log.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from alignkit.comparison.grid import Point
from alignkit.comparison.run_state import outcome_of
from alignkit.training.progress import SHOWN

TAIL = 8192  # bytes of metrics.jsonl that surely hold its last row
STYLES = {
    "failed": "bold red",
    "running": "bold",
    "measuring": "bold",
    "finished": "",
    "waiting": "dim",
}


@dataclass
class _Seen:
    """A run as its folder shows it."""

    state: str
    step: int = 0
    total: int = 0
    figures: str = ""
    seconds: float = 0.0


class LiveTable:
    """Use as a context manager; `watch` with the points at work whenever there may be something
    new.
    """

    def __init__(self, points: Sequence[Point], processes: int, console: Console | None = None):
        self.points = points
        self.processes = max(1, processes)
        self.console = console or Console(stderr=True)
        self.began: dict[str, float] = {}
        self.seen = {point.name: self._look(point, False) for point in points}
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
            before = self.seen[point.name]
            if point.name not in names and before.state not in ("running", "measuring"):
                continue
            found = self._look(point, point.name in names)
            self.seen[point.name] = found
            if (
                not self.live
                and found.state != before.state
                and found.state in ("finished", "failed", "running")
            ):
                self._say(point, found)
        if self.live:
            self.live.update(self._table())

    def _say(self, point: Point, found: _Seen) -> None:
        done = sum(seen.state in ("finished", "failed") for seen in self.seen.values())
        eta = f"  {self._eta()}" if found.state != "running" else ""
        text = f"[{done}/{len(self.points)}] {point.name}: {found.state}  {found.figures}".rstrip()
        self.console.print(text + eta, highlight=False, soft_wrap=True, markup=False)

    def _look(self, point: Point, working: bool) -> _Seen:
        outcome = outcome_of(point)
        total = point.recipe.train.steps or 0
        if outcome.status == "failed":
            return _Seen(
                "failed",
                total=total,
                figures=outcome.reason.partition("\n")[0],
                seconds=outcome.seconds,
            )
        row = last_row(Path(point.recipe.output_dir) / "metrics.jsonl")
        figures = "  ".join(f"{name} {row[name]:.3g}" for name in SHOWN if name in row)
        step = int(row.get("step", 0))
        if not working:
            state = "finished" if outcome.status == "finished" else "waiting"
            return _Seen(state, step, total, figures, outcome.seconds)
        began = self.began.setdefault(point.name, time.monotonic())
        return _Seen(
            "measuring" if outcome.status == "finished" else "running",
            step,
            total,
            figures,
            time.monotonic() - began,
        )

    def _eta(self) -> str:
        """What is left of each run by the duration of its curve's finished runs, else of all,
        shared by the workers.
        """
        known: dict[str, list[float]] = {}
        for point in self.points:
            seen = self.seen[point.name]
            if seen.state == "finished" and seen.seconds:
                known.setdefault(point.label, []).append(seen.seconds)
            elif seen.state == "running" and seen.step and seen.total:
                known.setdefault(point.label, []).append(seen.seconds * seen.total / seen.step)
        everything = [seconds for found in known.values() for seconds in found]
        if not everything:
            return "ETA not known yet"
        left = 0.0
        for point in self.points:
            seen = self.seen[point.name]
            if seen.state in ("waiting", "running"):
                left += max(
                    0.0,
                    mean(known.get(point.label, everything))
                    - (seen.seconds if seen.state == "running" else 0.0),
                )
        return f"ETA {_duration(left / self.processes)}"

    def _table(self) -> Table:
        count = {state: sum(seen.state == state for seen in self.seen.values()) for state in STYLES}
        said = ", ".join(f"{n} {state}" for state, n in count.items() if n)
        table = Table(title=f"{said}; {self._eta()}", title_justify="left", expand=True)
        for column, justify in (
            ("run", "left"),
            ("", "left"),
            ("step", "right"),
            ("time", "right"),
            ("", "left"),
        ):
            table.add_column(column, justify=justify, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
        room = max(4, self.console.height - 6)
        shown = self._shown(room)
        for point in shown:
            seen = self.seen[point.name]
            step = f"{seen.step}/{seen.total}" if seen.total else str(seen.step or "")
            spent = _duration(seen.seconds) if seen.seconds else ""
            table.add_row(
                point.name, seen.state, step, spent, seen.figures, style=STYLES[seen.state]
            )
        if len(shown) < len(self.points):
            table.add_row(
                f"... and {len(self.points) - len(shown)} more", "", "", "", "", style="dim"
            )
        return table

    def _shown(self, room: int) -> list[Point]:
        """As many as the screen holds; what goes on and what failed first."""
        order = ["running", "measuring", "failed", "finished", "waiting"]
        ranked = sorted(self.points, key=lambda point: order.index(self.seen[point.name].state))
        names = {point.name for point in ranked[:room]}
        return [point for point in self.points if point.name in names]


def last_row(file: Path) -> dict[str, Any]:
    """The last whole row of a JSONL file that may be growing; nothing where there is none."""
    try:
        with file.open("rb") as handle:
            handle.seek(max(0, os.fstat(handle.fileno()).st_size - TAIL))
            lines = handle.read().splitlines()
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        return row if isinstance(row, dict) else {}
    return {}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
