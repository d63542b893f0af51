"""What happened between two lines of a training log."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


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
