"""Pictures with an index: held in memory or decoded when asked for, the broken ones left out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from lediflow.data.batches import MapData, StepSampler, batches, draw, loaded
from lediflow.data.decode import (
    BrokenImage,
    BrokenImageError,
    Crop,
    decode,
    fit_square,
    read_picture,
    short_side,
)
from lediflow.data.listing import open_dataset, open_with_home
from lediflow.data.opening import picture_name
from lediflow.errors import UserError
from lediflow.files import quoted
from lediflow.pictures import to_float, to_uint8

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
OF_CLASSES = ("label",)  # columns of texts: the names of the classes


class ImageData(MapData):
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
        texts: Sequence[str] = (),
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
            texts: names that the column of texts may have, which is then read; ("label",) for the names of
                the classes; empty for no texts.

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
        self._name, self._max_broken = quoted(dataset), max_broken
        self._rows, self._home = open_with_home(
            dataset, split, texts=() if tuple(texts) == OF_CLASSES else texts
        )
        self.commit = self._home.commit
        if len(self._rows) == 0:
            raise UserError(f"{self._name} holds no images; add some")
        self._labels, self.class_names = _labels_of(self._rows, dataset)
        self.num_classes = len(self.class_names)
        self.texts = self._texts(texts)
        # Shared memory, so that what a loading process finds is known in all of them.
        self._flags = torch.zeros(len(self._rows), dtype=torch.uint8).share_memory_()
        self._images: Tensor | None = None
        if crop == "center" and len(self._rows) * channels * image_size**2 <= cache_gb * 1e9:
            self._decode_all()
        else:
            self._look_at_some()
        self.cached = self._images is not None

    @property
    def images(self) -> Tensor:
        """The whole set, uint8 (N, C, S, S).

        Raises:
            UserError: the set is not held in memory.
        """
        if self._images is None:
            raise UserError(
                f"{self._name} is not held in memory; use a centre crop and a larger cache_gb, or batches"
            )
        return self._images

    @property
    def labels(self) -> Tensor:
        """The class of every picture, int64 (N,); zeros without classes."""
        return self._labels

    @property
    def broken(self) -> list[BrokenImage]:
        """The broken pictures found so far, in the order of the dataset."""
        return list(self.broken_rows().values())

    def broken_rows(self) -> dict[int, BrokenImage]:
        """The broken pictures found so far, by their row in the dataset."""
        rows = torch.nonzero(self._flags == _BROKEN)[:, 0].tolist()
        return {row: self._broken_image(row) for row in rows}

    @property
    def num_small(self) -> int:
        """How many pictures smaller than ``image_size`` were found so far."""
        return int((self._flags == _SMALL).sum())

    def _texts(self, columns: Sequence[str]) -> list[str]:
        if tuple(columns) == OF_CLASSES:
            if not self.class_names:
                raise UserError(f"text.column is label, but {self._name} has no classes; name another column")
            return [self.class_names[label] for label in self._labels.tolist()]
        return [text or "" for text in self._rows["text"][:]] if columns else []

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        index, key = item if isinstance(item, tuple) else (item, None)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        index %= len(self)
        flipped, crop_key = (False, None) if key is None else draw(key, self.flip)
        if self._images is not None:
            image = self._images[index]
        else:
            index, pixels = self._readable_after(index, crop_key)
            image = torch.from_numpy(pixels)
        image = image.flip(-1) if flipped else image.clone()
        return {"image": image, "label": int(self._labels[index]), "index": index, "flipped": flipped}

    def batch(self, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Return the pictures of (index, key) pairs, uint8 (B, C, S, S), with label, index and flipped."""
        if self._images is None:
            return default_collate([self[pair] for pair in pairs])
        index = torch.tensor([index for index, _ in pairs])
        flipped = torch.tensor([draw(key, self.flip)[0] for _, key in pairs])
        images = self._images.index_select(0, index)
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        return {"image": images, "label": self._labels[index], "index": index, "flipped": flipped}

    def first(self, count: int) -> Tensor:
        """The first pictures, at most ``count``, cropped at the centre, float32 (n, C, S, S) in [-1, 1]."""
        return to_float(torch.stack([self[i]["image"] for i in range(min(count, len(self)))]))

    def first_labels(self, count: int) -> Tensor:
        """The classes of ``first``, int64 (n,)."""
        return torch.tensor([self[i]["label"] for i in range(min(count, len(self)))])

    def in_order(self, batch_size: int, *, mirror: bool = False, workers: int = 0) -> Iterator[Tensor]:
        """Go through the readable pictures once, float32 (B, C, S, S) in [-1, 1] at a time."""
        for images, _ in self.readable(range(len(self)), batch_size, workers):
            yield to_float(images.flip(-1) if mirror else images)

    def show(self, items: Tensor) -> Tensor:
        """Pictures are visible as they are."""
        return items

    def readable(self, rows: range, batch_size: int, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Decode some rows, cropped at the centre; broken pictures are left out.

        Yields:
            uint8 (b, C, S, S) and the indices int64 (b,), for every ``batch_size`` rows; b may be smaller.

        Raises:
            UserError: too many broken pictures.
        """
        parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        for images, index in loaded(self._readable_of, parts, workers if self._images is None else 0):
            self._refuse_if_hopeless(len(self._flags))
            if len(index):
                yield images, index

    def _readable_of(self, rows: range) -> tuple[Tensor, Tensor]:
        if self._images is not None:
            return self._images[rows.start : rows.stop], torch.arange(rows.start, rows.stop)
        decoded = {row: self._decode(row) for row in rows}
        good = {row: torch.from_numpy(pixels) for row, pixels in decoded.items() if pixels is not None}
        return torch.stack(list(good.values())) if good else torch.empty(0), torch.tensor(list(good))

    def _read(self, row: int) -> Image.Image:
        return read_picture(
            self._rows[row]["image"], channels=self.channels, image_size=self.image_size, home=self._home
        )

    def _decode(self, row: int, crop_key: int | None = None) -> np.ndarray | None:
        """Decode one row to uint8 (C, S, S) and flag it; None if it is broken."""
        try:
            picture = self._read(row)
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
        # PIL lets other threads run while it decodes. Each reads its own row, so that no more pictures are in
        # memory than there are threads; a block of rows at a time, for results wait until they are fetched.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, total, 256):
                rows = range(start, min(start + 256, total))
                for row, pixels in zip(rows, pool.map(self._decode, rows), strict=True):
                    if pixels is not None:
                        images[row] = torch.from_numpy(pixels)
        self._report(total)
        good = self._flags != _BROKEN
        if not bool(good.all()):
            images, self._labels = images[good], self._labels[good]
            if self.texts:
                self.texts = [self.texts[row] for row in good.nonzero()[:, 0].tolist()]
        self._images = images

    def _look_at_some(self) -> None:
        """Read the headers of up to 1,000 pictures, so that a hopeless set is refused before training."""
        rows = np.unique(np.linspace(0, len(self._rows) - 1, num=min(1000, len(self._rows)), dtype=np.int64))
        for row in rows.tolist():
            try:
                if short_side(self._rows[row]["image"], self._home) < self.image_size:
                    self._flags[row] = _SMALL
            except BrokenImageError:
                self._flags[row] = _BROKEN
        self._report(len(rows))

    def _report(self, seen: int) -> None:
        small = self.num_small
        if small:
            warnings.warn(
                f"{small:,} of {seen:,} images in {self._name} are smaller than {self.image_size} pixels "
                "and are enlarged",
                stacklevel=4,
            )
        count = self._refuse_if_hopeless(seen)
        if count:
            warnings.warn(
                f"{count:,} of {seen:,} images in {self._name} cannot be read and are left out: "
                f"{self._first_broken(3)}",
                stacklevel=4,
            )

    def _refuse_if_hopeless(self, seen: int) -> int:
        count = int((self._flags == _BROKEN).sum())
        if count and (count >= seen or count > self._max_broken * seen):
            raise UserError(
                f"{count:,} of {seen:,} images in {self._name} cannot be read: {self._first_broken(5)}; "
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
        name = picture_name(self._rows[row]["image"], row)
        try:
            self._read(row)
        except BrokenImageError as error:
            return BrokenImage(name, str(error))
        return BrokenImage(name, "could not be read at first")

    def _readable_after(self, index: int, crop_key: int | None) -> tuple[int, np.ndarray]:
        """Return the first readable picture at or after ``index``, going round, and its own index."""
        for row in chain(range(index, len(self)), range(index)):
            if self._flags[row] == _BROKEN:
                continue
            pixels = self._decode(row, crop_key)
            if pixels is not None:
                return row, pixels
            if self._refuse_if_hopeless(len(self)) == 1:
                warnings.warn(
                    f"an image in {self._name} cannot be read, and the next one stands in for it: "
                    f"{self._first_broken(1)}; later ones are only counted, in ImageData.broken",
                    stacklevel=3,
                )
        raise UserError(f"none of the {len(self):,} images in {self._name} can be read")


def _labels_of(rows: datasets.Dataset, dataset: str) -> tuple[Tensor, list[str]]:
    if "label" not in rows.column_names:
        return torch.zeros(len(rows), dtype=torch.int64), []
    labels = rows["label"][:]
    if any(label is None or label < 0 for label in labels):
        raise UserError(f"some labels in {quoted(dataset)} are missing or negative; remove those rows")
    names = getattr(rows.features["label"], "names", None)
    return torch.tensor(labels, dtype=torch.int64), names or [str(i) for i in range(max(labels) + 1)]
