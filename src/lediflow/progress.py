"""The line people watch while something takes its time: a bar on a terminal, lines in a log file."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 15.0  # where there is no terminal to redraw


class Progress:
    """A live bar on a terminal, a line now and then in a log file: what is done, a status, the time left.

    Args:
        name: of what is under way.
        start: what is done already.
        steps: of how much.
        silent: show nothing; for all processes but the main one.
    """

    def __init__(self, name: str, start: int, steps: int, *, silent: bool = False):
        self.name, self.start, self.steps, self.silent = name, start, steps, silent
        self.console = Console(stderr=True)
        self.live: RichProgress | None = None
        self.task: TaskID | None = None
        self.began = self.printed = time.monotonic()

    def __enter__(self) -> Progress:
        if self.console.is_terminal and not self.silent:
            self.live = RichProgress(
                TextColumn("{task.description:>10}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.live.start()
            self.task = self.live.add_task(self.name, total=self.steps, completed=self.start, status="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def update(self, step: int, status: str = "") -> None:
        """Show that `step` of the steps are done, with a status such as the loss."""
        if self.silent:
            return
        if self.live is not None and self.task is not None:
            self.live.update(self.task, completed=step, status=status)
            return
        now = time.monotonic()
        if now - self.printed < SECONDS_BETWEEN_LINES and step < self.steps:
            return
        self.printed = now
        left = (now - self.began) / max(1, step - self.start) * (self.steps - step)
        eta = timedelta(seconds=round(left))
        print(f"{self.name:>10} {step}/{self.steps}  {status}  {eta} left", file=sys.stderr, flush=True)
