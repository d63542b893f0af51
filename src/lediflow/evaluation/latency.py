"""Time what makes images: the median of a few repeats, with candidates taking turns.

A laptop warms up and a shared machine has neighbours. When one candidate is timed to the end before the
next begins, such drift looks like a difference between them; here each round times every candidate once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lediflow.errors import UserError


@dataclass(frozen=True)
class Latency:
    """What one candidate took.

    Attributes:
        ms_per_image: median over the repeats, in milliseconds, divided by the images of a call.
        images_per_second: the same as a rate.
        repeats: timed calls.
        batch_size: images that one call makes.
        spread: (slowest - fastest) / median of the repeats, 0 or more. Differences between candidates
            that are not clearly larger than this mean nothing.
    """

    ms_per_image: float
    images_per_second: float
    repeats: int
    batch_size: int
    spread: float


def measure(
    fn: Callable[[], object],
    *,
    images: int,
    repeats: int = 5,
    warmup: int = 1,
    device: str | torch.device = "cpu",
) -> Latency:
    """Time one function; see :func:`compare`, which is to be used when there are two."""
    return compare({"": fn}, images=images, repeats=repeats, warmup=warmup, device=device)[""]


def compare(
    fns: Mapping[str, Callable[[], Any]],
    *,
    images: int,
    repeats: int = 5,
    warmup: int = 1,
    device: str | torch.device = "cpu",
    clock: Callable[[], float] | None = None,
) -> dict[str, Latency]:
    """Time several functions in turn, A B C A B C ..., so that the machine's drift meets all alike.

    Args:
        fns: candidates by name; each call makes ``images`` images.
        images: images that one call of any candidate makes, at least 1.
        repeats: timed calls of each candidate, at least 1.
        warmup: untimed calls of each, taken in the same turns before the timed ones, 0 or more.
        device: where the work is done. On CUDA the clock is read only after all queued work is done.
        clock: in seconds; None for the time of day. ``time.process_time`` counts what the CPU did for this
            process, all threads added up: of one thread it says more on a machine that others keep busy.

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
    return {name: _summary(taken, images) for name, taken in seconds.items()}


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


def _summary(seconds: list[float], images: int) -> Latency:
    # A call that does nothing can take no time at all by a coarse clock.
    median = max(statistics.median(seconds), 1e-9)
    return Latency(
        ms_per_image=1000 * median / images,
        images_per_second=images / median,
        repeats=len(seconds),
        batch_size=images,
        spread=(max(seconds) - min(seconds)) / median,
    )


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
        fn: what is timed.
        parts: (object, name of its method) by the part's name, none within another; a module's part is its
            "forward".
        repeats: timed calls after an untimed one, at least 1.
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

    fn()
    try:
        for name, (owner, method) in parts.items():
            setattr(owner, method, timed(name, getattr(owner, method)))
        whole = sum(time_once(fn, where) for _ in range(repeats))
    finally:
        for owner, method in parts.values():
            vars(owner).pop(method, None)  # the class's own method shows again
    return {name: seconds / max(whole, 1e-9) for name, seconds in spent.items()}
