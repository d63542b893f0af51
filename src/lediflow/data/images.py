"""Pictures -> batches: a folder, Parquet or Arrow files, or the embedded handwritten digits.

``ImageData`` holds or decodes the pictures, ``batches`` serves them in an order that depends on the seed
and the step alone, so that a run can go on from any step.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from lediflow.data.decode import (
    BrokenImage,
    BrokenImageError,
    Crop,
    decode,
    fit_square,
    open_dataset,
    read_picture,
    short_side,
)
from lediflow.errors import UserError

if TYPE_CHECKING:
    import datasets

__all__ = [
    "BrokenImage",
    "BrokenImageError",
    "ImageData",
    "StepSampler",
    "batches",
    "decode",
    "open_dataset",
    "to_float",
    "to_uint8",
]

_BROKEN, _SMALL = 1, 2


class ImageData(TorchDataset):
    """Pictures of one size, as uint8, with their labels.

    Where ``crop="center"`` and the whole set fits in ``cache_gb``, all of it is decoded here and now, the
    broken pictures are dropped and ``len`` counts the good ones. Otherwise pictures are decoded when
    asked for, and the next readable one stands in for a broken one.

    An item is ``{"image": uint8 tensor (C, S, S), "label": int (0 without classes), "index": int,
    "flipped": bool}``; ``index`` is that of the picture really served. Asked for by an int, a picture is
    cropped at the centre and not flipped. Asked for by ``(index, key)``, the key alone decides the random
    crop and the flip.

    Attributes:
        class_names: names of the classes, empty without classes.
        num_classes: how many, 0 without classes.
        cached: whether the whole set is held in memory.
    """

    def __init__(
        self,
        dataset: str,
        *,
        image_size: int,
        channels: Literal[1, 3] = 3,
        split: str = "train",
        crop: Crop = "center",
        flip: bool = False,
        max_broken: float = 0.5,
        cache_gb: float = 1.0,
    ) -> None:
        """Open DATASET and decode it, if it fits.

        Args:
            dataset: as for :func:`open_dataset`.
            image_size: side S in pixels; smaller pictures are enlarged, with one warning.
            channels: 1 for grey, 3 for RGB.
            split: ``train`` or ``validation``.
            crop: ``center``, or ``random`` for a new place along the longer side at every visit.
            flip: mirror half of the pictures left to right.
            max_broken: the largest share of broken pictures to put up with, 0 to 1.
            cache_gb: gigabytes (10^9 bytes) that the decoded set may take; 0 decodes when asked.

        Raises:
            UserError: an impossible setting, no pictures, or too many broken ones.
        """
        if image_size < 1:
            raise UserError(f"image_size must be 1 or more, not {image_size}")
        if channels not in (1, 3):
            raise UserError(f"channels must be 1 (grey) or 3 (colour), not {channels}")
        if crop not in ("center", "random"):
            raise UserError(f"crop must be 'center' or 'random', not {crop!r}")
        if not 0 <= max_broken <= 1:
            raise UserError(f"max_broken is a share between 0 and 1, not {max_broken}")
        self.image_size, self.channels, self.crop, self.flip = image_size, channels, crop, flip
        self._name, self._max_broken = dataset, max_broken
        self._rows = open_dataset(dataset, split)
        if len(self._rows) == 0:
            raise UserError(f"{dataset!r} holds no images; add some")
        self._labels, self.class_names = _labels_of(self._rows, dataset)
        self.num_classes = len(self.class_names)
        # Shared memory, so that what a loading process finds is known in all of them.
        self._flags = torch.zeros(len(self._rows), dtype=torch.uint8).share_memory_()
        self._images: torch.Tensor | None = None
        if crop == "center" and len(self._rows) * channels * image_size**2 <= cache_gb * 1e9:
            self._decode_all()
        else:
            self._look_at_some()

    @property
    def cached(self) -> bool:
        """Whether the whole set is held in memory."""
        return self._images is not None

    @property
    def images(self) -> torch.Tensor:
        """The whole set, uint8 (N, C, S, S).

        Raises:
            UserError: the set is not held in memory.
        """
        if self._images is None:
            raise UserError(
                f"{self._name!r} is not held in memory; use a centre crop and a larger cache_gb, or batches"
            )
        return self._images

    @property
    def labels(self) -> torch.Tensor:
        """The class of every picture, int64 (N,); zeros without classes."""
        return self._labels

    @property
    def broken(self) -> list[BrokenImage]:
        """The broken pictures found so far, in the order of the dataset."""
        return [self._broken_image(row) for row in torch.nonzero(self._flags == _BROKEN)[:, 0].tolist()]

    @property
    def num_small(self) -> int:
        """How many pictures smaller than ``image_size`` were found so far."""
        return int((self._flags == _SMALL).sum())

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        index, key = item if isinstance(item, tuple) else (item, None)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        index %= len(self)
        flipped, crop_key = (False, None) if key is None else _draw(key, self.flip)
        if self._images is not None:
            image = self._images[index]
        else:
            index, pixels = self._readable(index, crop_key)
            image = torch.from_numpy(pixels)
        image = image.flip(-1) if flipped else image.clone()
        return {"image": image, "label": int(self._labels[index]), "index": index, "flipped": flipped}

    def _decode(self, row: int, record: Any, crop_key: int | None = None) -> np.ndarray | None:
        """Decode one row to uint8 (C, S, S) and flag it; None if it is broken."""
        try:
            picture = read_picture(record, channels=self.channels, image_size=self.image_size)
        except BrokenImageError:
            self._flags[row] = _BROKEN
            return None
        if min(picture.size) < self.image_size:
            self._flags[row] = _SMALL
        crop: Crop = "center" if crop_key is None else self.crop
        return fit_square(picture, self.image_size, crop=crop, key=crop_key)

    def _decode_all(self) -> None:
        total, size = len(self._rows), self.image_size
        images = torch.empty((total, self.channels, size, size), dtype=torch.uint8)
        # PIL lets other threads run while it decodes. A block at a time, or the stored bytes of the whole
        # set would be in memory at once.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, total, 256):
                rows = range(start, min(start + 256, total))
                records = self._rows[start : rows.stop]["image"]
                for row, pixels in zip(rows, pool.map(self._decode, rows, records), strict=True):
                    if pixels is not None:
                        images[row] = torch.from_numpy(pixels)
        self._report(total)
        good = self._flags != _BROKEN
        if not bool(good.all()):
            images, self._labels = images[good], self._labels[good]
        self._images = images

    def _look_at_some(self) -> None:
        """Read the headers of up to 1,000 pictures, so that a hopeless set is refused before training."""
        rows = np.unique(np.linspace(0, len(self._rows) - 1, num=min(1000, len(self._rows)), dtype=np.int64))
        for row in rows.tolist():
            try:
                if short_side(self._rows[row]["image"]) < self.image_size:
                    self._flags[row] = _SMALL
            except BrokenImageError:
                self._flags[row] = _BROKEN
        self._report(len(rows))

    def _report(self, seen: int) -> None:
        small = self.num_small
        if small:
            warnings.warn(
                f"{small:,} of {seen:,} images in {self._name!r} are smaller than {self.image_size} pixels "
                "and are enlarged",
                stacklevel=4,
            )
        count = self._refuse_if_hopeless(seen)
        if count:
            warnings.warn(
                f"{count:,} of {seen:,} images in {self._name!r} cannot be read and are left out: "
                f"{self._first_broken(3)}",
                stacklevel=4,
            )

    def _refuse_if_hopeless(self, seen: int) -> int:
        count = int((self._flags == _BROKEN).sum())
        if count and (count >= seen or count > self._max_broken * seen):
            raise UserError(
                f"{count:,} of {seen:,} images in {self._name!r} cannot be read: {self._first_broken(5)}; "
                "mend or remove them"
            )
        return count

    def _first_broken(self, most: int) -> str:
        rows = torch.nonzero(self._flags == _BROKEN)[:, 0].tolist()
        named = [self._broken_image(row) for row in rows[:most]]
        text = ", ".join(f"{image.name} ({image.reason})" for image in named)
        return text + (", ..." if len(rows) > most else "")

    def _broken_image(self, row: int) -> BrokenImage:
        # Read again for the reason: it may have been another process that found the picture broken.
        record = self._rows[row]["image"]
        name = (record or {}).get("path") or f"row {row}"
        try:
            read_picture(record, channels=self.channels, image_size=self.image_size)
        except BrokenImageError as error:
            return BrokenImage(name, str(error))
        return BrokenImage(name, "could not be read at first")

    def _readable(self, index: int, crop_key: int | None) -> tuple[int, np.ndarray]:
        """Return the first readable picture at or after ``index``, going round, and its own index."""
        for row in [*range(index, len(self)), *range(index)]:
            if self._flags[row] == _BROKEN:
                continue
            pixels = self._decode(row, self._rows[row]["image"], crop_key)
            if pixels is not None:
                return row, pixels
            if self._refuse_if_hopeless(len(self)) == 1:
                warnings.warn(
                    f"an image in {self._name!r} cannot be read, and the next one stands in for it: "
                    f"{self._first_broken(1)}; later ones are only counted, in ImageData.broken",
                    stacklevel=3,
                )
        raise UserError(f"none of the {len(self):,} images in {self._name!r} can be read")


def _labels_of(rows: datasets.Dataset, dataset: str) -> tuple[torch.Tensor, list[str]]:
    if "label" not in rows.column_names:
        return torch.zeros(len(rows), dtype=torch.int64), []
    labels = rows["label"][:]
    if any(label is None or label < 0 for label in labels):
        raise UserError(f"some labels in {dataset!r} are missing or negative; remove those rows")
    names = getattr(rows.features["label"], "names", None)
    return torch.tensor(labels, dtype=torch.int64), names or [str(i) for i in range(max(labels) + 1)]


def _draw(key: int, flip: bool) -> tuple[bool, int]:
    """Return whether to flip, and a key for the crop that is independent of it."""
    generator = random.Random(key)
    return generator.random() < 0.5 and flip, generator.getrandbits(64)


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches that depend on the seed and the step alone: a ``batch_sampler`` for a DataLoader.

    Yields, for every step from ``start`` to ``stop - 1``, a list of ``batch_size`` pairs (index, key).
    Every epoch is a fresh permutation. Batches run on over the end of an epoch, so all are full, even
    where ``batch_size`` exceeds ``length``.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Set the order.

        Args:
            length: number of pictures.
            batch_size: pairs in a batch.
            seed: any integer.
            start: first step.
            stop: the step after the last.
            rank: which process this is.
            world_size: how many processes share a batch; each iterates over its equal slice.

        Raises:
            UserError: a length or batch size under 1, a negative start, or a batch that cannot be cut into
                equal slices.
        """
        if length < 1 or batch_size < 1 or start < 0:
            raise UserError(
                f"length {length} and batch_size {batch_size} must be 1 or more, and start {start} 0 or more"
            )
        if batch_size % world_size:
            raise UserError(f"batch_size {batch_size} is not divisible by the {world_size} processes")
        self.length, self.batch_size, self.start, self.stop = length, batch_size, start, stop
        share = batch_size // world_size
        self._slice = slice(rank * share, (rank + 1) * share)
        self._seed = seed % 2**64
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            yield self.batch(step)[self._slice]

    def batch(self, step: int) -> list[tuple[int, int]]:
        """Return the (index, key) pairs of all of any one step, without going through those before it."""
        first = step * self.batch_size
        return [self._pair(position) for position in range(first, first + self.batch_size)]

    def _pair(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            # The 0 and the 1 keep the two uses of the seed apart: orders here, keys below.
            self._order = np.random.default_rng((self._seed, 0, epoch)).permutation(self.length)
            self._epoch = epoch
        key = np.random.SeedSequence((self._seed, 1, position)).generate_state(1, np.uint64)
        return int(self._order[place]), int(key[0])


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Bring uint8 values 0 to 255, of any shape, to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Bring float values in [-1, 1], of any shape, to uint8 by rounding; values beyond are cut off."""
    return ((images.to(torch.float32) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def batches(
    data: ImageData,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    stop: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the batches of steps ``start`` to ``stop - 1``; a batch depends on seed and step alone.

    Args:
        data: the pictures.
        batch_size: pictures in every batch, B.
        seed: decides order, crops and flips.
        start: first step; training that goes on from step k passes k and sees what it would have seen.
        stop: the step after the last.
        workers: loading processes; 0 loads in this one. The batches are the same.
        rank: which of the training processes this is.
        world_size: how many share a batch; each gets its slice of it, B / world_size pictures.

    Yields:
        ``{"image": float32 (B, C, S, S) in [-1, 1], "label": int64 (B,), "index": int64 (B,),
        "flipped": bool (B,)}``.

    Raises:
        UserError: a batch size under 1, a negative start, or too many broken pictures on the way.
    """
    sampler = StepSampler(len(data), batch_size, seed, start, stop, rank, world_size)
    return _from_memory(data, sampler) if data.cached and workers == 0 else _loaded(data, sampler, workers)


def _from_memory(data: ImageData, sampler: StepSampler) -> Iterator[dict[str, torch.Tensor]]:
    for pairs in sampler:
        index = torch.tensor([index for index, _ in pairs])
        flipped = torch.tensor([_draw(key, data.flip)[0] for _, key in pairs])
        images = data.images.index_select(0, index)
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        yield {"image": to_float(images), "label": data.labels[index], "index": index, "flipped": flipped}


def _loaded(data: ImageData, sampler: StepSampler, workers: int) -> Iterator[dict[str, torch.Tensor]]:
    # Its own generator: a DataLoader otherwise draws a number from the global one each time it starts.
    loader: DataLoader = DataLoader(
        data, batch_sampler=sampler, num_workers=workers, generator=torch.Generator().manual_seed(0)
    )
    for batch in loader:
        yield {**batch, "image": to_float(batch["image"])}
