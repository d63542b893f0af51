"""Time and memory of what makes images: the median of a few repeats, with candidates taking turns."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lediflow.errors import UserError


@dataclass(frozen=True)
class Latency:
    """What one candidate took."""

    ms_per_image: float  # median over the repeats
    images_per_second: float
    spread: float  # (slowest - fastest) / median; smaller differences between candidates mean nothing


def compare(
    fns: Mapping[str, Callable[[], Any]],
    *,
    images: int,
    repeats: int = 3,
    warmup: int = 1,
    device: str | torch.device = "cpu",
    clock: Callable[[], float] | None = None,
) -> dict[str, Latency]:
    """Time several functions in turn, A B C A B C ..., so that the machine's drift meets all alike.

    Args:
        fns: candidates by name.
        images: images that one call of any candidate makes, at least 1.
        repeats: timed calls of each candidate, at least 1.
        warmup: untimed calls of each, taken in the same turns before the timed ones, 0 or more.
        device: where the work is done. On CUDA the clock is read only after all queued work is done.
        clock: in seconds; None for the time of day. ``time.process_time`` adds up what all threads of this
            process did: of one thread it says more on a machine that others keep busy.

    Returns:
        A :class:`Latency` for each name, in the order given.

    Raises:
        UserError: if there is no candidate, or a count is too small.
    """
    if not fns or images < 1 or repeats < 1 or warmup < 0:
        raise UserError(
            "timing needs at least one candidate, one image and one repeat, and no negative warm-up, "
            f"not {len(fns)} candidates, images={images}, repeats={repeats}, warmup={warmup}"
        )
    where = torch.device(device)
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    for turn in range(warmup + repeats):
        for name, fn in fns.items():
            taken = time_once(fn, where, clock)
            if turn >= warmup:
                seconds[name].append(taken)
    found = {}
    for name, each in seconds.items():
        # a call that does nothing can take no time at all by a coarse clock
        median = max(statistics.median(each), 1e-9)
        found[name] = Latency(1000 * median / images, images / median, (max(each) - min(each)) / median)
    return found


def time_once(fn: Callable[[], Any], device: torch.device, clock: Callable[[], float] | None = None) -> float:
    """Return the seconds of one call, with all queued work of a CUDA device done before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = clock or time.perf_counter
    start = clock()
    fn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def part_shares(
    fn: Callable[[], object],
    parts: Mapping[str, tuple[Any, str]],
    *,
    repeats: int = 3,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Tell which share of a function's time goes to its parts: to certain methods of certain objects.

    On CUDA each part's end is waited for, so the function itself runs slower here: take shares, and the whole
    time from :func:`compare`.

    Args:
        fn: what is timed; call it once before, if the first call takes longer.
        parts: (object, name of its method) by the part's name, none within another.
        repeats: timed calls, at least 1.
        device: where the work is done.

    Returns:
        Each part's share in 0 to 1, over all repeats; what is left to 1 is neither's.
    """
    where = torch.device(device)
    spent: dict[str, float] = dict.fromkeys(parts, 0.0)

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            box: list[Any] = []
            spent[name] += time_once(lambda: box.append(method(*args, **kwargs)), where)
            return box[0]

        return call

    before = [(owner, method, vars(owner).get(method)) for owner, method in parts.values()]
    try:
        for name, (owner, method) in parts.items():
            vars(owner)[method] = timed(name, getattr(owner, method))
        whole = sum(time_once(fn, where) for _ in range(repeats))
    finally:
        for owner, method, own in before:
            if own is None:
                vars(owner).pop(method, None)  # the class's own method shows again
            else:
                vars(owner)[method] = own
    return {name: seconds / max(whole, 1e-9) for name, seconds in spent.items()}


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Yield a list that holds the peak of memory in use, in bytes, when the block ends.

    On CUDA it is the allocator's peak. On a CPU it is the process' resident memory, looked at every
    millisecond, everything that was there before included.
    """
    peak = [0.0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = float(torch.cuda.max_memory_allocated(device))
        return
    import psutil

    gc.collect()
    process, done = psutil.Process(), threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
