"""The line people watch while a stage trains."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 15.0  # where there is no terminal to redraw


class Meter:
    """What happened since the last reading: losses, images, and how long training waited for them."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.losses: list[float] = []
        self.images, self.waited, self.began = 0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def count(self, loss: float, images: int) -> None:
        """Note one step."""
        self.losses.append(loss)
        self.images += images

    def read(self) -> dict[str, float | None]:
        """Return loss (mean; None where none was finite), images_per_second and waiting (share); reset."""
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        seconds = time.perf_counter() - self.began
        reading = {
            "loss": sum(finite) / len(finite) if finite else None,
            "images_per_second": round(self.images / seconds, 1),
            "waiting": round(self.waited / seconds, 4),
        }
        self._reset()
        return reading


def memory_gb(device: torch.device) -> float:
    """Return the memory in use, GB: the peak on a CUDA GPU, else of this process now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


class Progress:
    """A live bar on a terminal, a line now and then in a log file: step, loss, images/s, memory, time left.

    Args:
        name: of the stage, or of what else is under way.
        start: the step that training goes on from.
        steps: the last step.
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

    def update(self, step: int, status: str) -> None:
        """Show the state after `step` steps."""
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
