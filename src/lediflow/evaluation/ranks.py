"""Work split over the processes of a launch, with the result that one process would have.

Whole batches go to the processes in turn, so each batch is made of the same images whatever the number of
processes, and comes out the same to the last bit. Without a launch every function is its plain self.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


def join_launch(device: str | None) -> torch.device | None:
    """Join the processes that torchrun or `accelerate launch` started; return one's own device, else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu").device


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return _place()[0] == 0


def from_first(make: Callable[[], T]) -> T:
    """Call `make` in the first process only and return its result in all."""
    rank, count = _place()
    if count == 1:
        return make()
    box = [make() if rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def in_batches(total: int, batch_size: int, make: Callable[[range], list[Tensor]]) -> list[Tensor]:
    """Make tensors for `total` images in batches, split over the processes, and return them whole in all.

    Args:
        total: images.
        batch_size: images of a batch; the last may be smaller.
        make: for the indices of a batch, one or more CPU tensors whose first dimension is the images.

    Returns:
        As many tensors as `make` returns, (total, ...).
    """
    rank, count = _place()
    starts = range(0, total, batch_size)
    parts = {s: make(range(s, min(s + batch_size, total))) for s in starts[rank::count]}
    if count > 1:
        gathered: list = [None] * count
        dist.all_gather_object(gathered, parts)
        parts = {start: part for other in gathered for start, part in other.items()}
    return [torch.cat(columns) for columns in zip(*(parts[start] for start in starts), strict=True)]


def _place() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
