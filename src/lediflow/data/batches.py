"""Batches in an order that depends on the seed and the step alone, on any number of ranks.

What the stages train on is a `TrainingData`: pictures (images.py), codec latents (codec_latents.py), or a
stream of pictures (streams.py).
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from lediflow.errors import UserError
from lediflow.pictures import to_float


class TrainingData(ABC):
    """What the stages see of the data. Everything is float32 (C, H, W): pixels in [-1, 1], or latents.

    Attributes:
        cached: whether item i is always the same save for its mirror, and all items are in memory, so that
            what is computed from them once may be kept.
        flip: whether half of the items are mirrored.
        class_names: names of the classes, empty without classes.
        num_classes: how many, 0 without classes.
        commit: hash of the commit that a Hub data set was read at; "" for others.
        texts: what each item shows, by its index; empty where no texts were asked for.
    """

    commit: str = ""
    texts: Sequence[str] = ()
    cached: bool
    flip: bool
    class_names: list[str]
    num_classes: int

    @abstractmethod
    def first(self, count: int) -> Tensor:
        """The first items, at most `count`, neither flipped nor randomly cropped, (n, C, H, W)."""

    @abstractmethod
    def first_labels(self, count: int) -> Tensor:
        """The classes of `first`, int64 (n,); zeros without classes."""

    @abstractmethod
    def in_order(self, batch_size: int, *, mirror: bool = False, workers: int = 0) -> Iterator[Tensor]:
        """Go through the readable items once, (B, C, H, W) at a time, each mirrored if `mirror`."""

    @abstractmethod
    def show(self, items: Tensor) -> Tensor:
        """Make items, or what a network makes instead of them, visible: (n, 1 or 3, H, W) in [-1, 1]."""

    @abstractmethod
    def serve(
        self, *, batch_size: int, seed: int, start: int, stop: int, workers: int, rank: int, world_size: int
    ) -> Iterator[dict[str, Any]]:
        """Yield this rank's part of the batches; see `batches`."""


class MapData(TrainingData):
    """Items with an index. The batch of a step is the same whatever the number of ranks."""

    @abstractmethod
    def __len__(self) -> int:
        """How many items there are."""

    @abstractmethod
    def batch(self, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Return the items of (index, key) pairs; the key alone decides crop, flip and noise.

        The tensors are ``image`` (uint8 pixels or float32 latents), ``label``, ``index`` and ``flipped``.
        """

    def serve(self, *, batch_size, seed, start, stop, workers, rank, world_size):
        """Yield this rank's slice of every step's batch; see `batches`."""
        sampler = StepSampler(len(self), batch_size, seed, start, stop, rank=rank, world_size=world_size)
        for batch in loaded(self.batch, sampler, workers):
            yield (
                {**batch, "image": to_float(batch["image"])} if batch["image"].dtype == torch.uint8 else batch
            )


def batches(
    data: TrainingData,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    stop: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    **position: Any,
) -> Iterator[dict[str, Any]]:
    """Yield the batches of steps ``start`` to ``stop - 1``; a batch depends on seed and step alone.

    Args:
        data: what to serve.
        batch_size: items in a step's batch on all ranks together, B.
        seed: decides order, crops, flips and the noise of a codec's latents.
        start: first step; training that resumes at step k passes k and sees what it would have seen.
        stop: the step after the last.
        workers: loading processes of this rank; 0 loads in this one. The batches are the same (those of a
            stream depend on the number).
        rank: which part of every batch to yield, 0 to world_size - 1.
        world_size: number of parts, n. Together the ranks yield the batches that one rank would (those of a
            stream depend on the number).
        **position: ``position=`` of a stream, to go on without reading again; see streams.py.

    Yields:
        ``{"image": float32 (B / n, C, H, W), "label": int64 (B / n,), "index": int64 (B / n,),
        "flipped": bool (B / n,)}``; from a stream also ``"position"``.

    Raises:
        UserError: a batch size under 1 or no multiple of world_size, a negative start, or too many broken
            pictures on the way.
    """
    if batch_size < 1 or start < 0:
        raise UserError(f"batch_size {batch_size} must be 1 or more, and start {start} 0 or more")
    if not 0 <= rank < world_size or batch_size % world_size:
        raise UserError(
            f"a batch of {batch_size} cannot be shared by {world_size} processes; "
            "make batch_size a multiple of their number"
        )
    return data.serve(
        batch_size=batch_size, seed=seed, start=start, stop=stop, workers=workers, rank=rank,
        world_size=world_size, **position,
    )  # fmt: skip


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches that depend on the seed and the step alone.

    Yields, for every step from ``start`` to ``stop - 1``, a list of pairs (index, key). Every epoch is a
    fresh permutation. Batches run on over the end of an epoch, so all are full, even where ``batch_size``
    exceeds ``length``.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Set the order.

        Args:
            length: number of items.
            batch_size: pairs in a batch on all ranks together, a multiple of world_size.
            seed: any integer.
            start: first step.
            stop: the step after the last.
            rank: which contiguous slice of every batch to yield.
            world_size: number of slices.

        Raises:
            UserError: no items.
        """
        if length < 1:
            raise UserError("there is nothing to make batches of; the data is empty")
        self.length, self.batch_size, self.start, self.stop = length, batch_size, start, stop
        self._mine = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._seed = seed % 2**64
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            yield self.batch(step)

    def batch(self, step: int) -> list[tuple[int, int]]:
        """Return the (index, key) pairs of any one step, without going through those before it."""
        return [self._pair(step * self.batch_size + place) for place in self._mine]

    def _pair(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            # The 0 and the 1 keep the two uses of the seed apart: orders here, keys below.
            self._order = np.random.default_rng((self._seed, 0, epoch)).permutation(self.length)
            self._epoch = epoch
        return int(self._order[place]), position_key(self._seed, position)


def position_key(seed: int, *position: int) -> int:
    """Return the key of a place in the order of serving: 64 bits that decide crop, flip and noise there."""
    return int(np.random.SeedSequence((seed % 2**64, 1, *position)).generate_state(1, np.uint64)[0])


def draw(key: int, flip: bool) -> tuple[bool, int]:
    """Return whether to flip, and 64 bits for crop or noise that are independent of it."""
    generator = random.Random(key)
    return generator.random() < 0.5 and flip, generator.getrandbits(64)


def loaded(load: Any, order: Any, workers: int) -> Iterator[Any]:
    """Yield ``load(item)`` for the items of ``order``, in that order, from worker processes if there are any.

    Raises:
        UserError: as raised by ``load``, there or here.
    """
    if not workers:
        yield from map(load, order)
        return
    for result in whole_loader(_Loading(load), workers, sampler=order):
        if isinstance(result, Refusal):
            raise UserError(result.message)
        yield result


def whole_loader(dataset: Any, workers: int, sampler: Any = None) -> DataLoader:
    """Return a DataLoader that hands over what the dataset yields, as it is."""
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        # a DataLoader otherwise draws a number from the global generator each time it starts
        generator=torch.Generator().manual_seed(0),
    )


def _as_it_is(item: Any) -> Any:
    return item


class Refusal:
    """A UserError on its way out of a worker: a DataLoader would wrap its message in a traceback."""

    def __init__(self, message: str) -> None:
        self.message = message


class _Loading(TorchDataset):
    def __init__(self, load: Any) -> None:
        self._load = load

    def __getitem__(self, item: Any) -> Any:
        try:
            return self._load(item)
        except UserError as error:
            return Refusal(str(error))
