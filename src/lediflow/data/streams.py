"""Pictures read in the order of their storage: for tar shards and Hub datasets too large to be addressed.

Every epoch takes the shards in a new order and splits them over ranks and workers (datasets does both);
within a worker, blocks of pictures are shuffled. The order depends on the seed, the number of ranks and that
of workers. A batch carries its position; given back, the stream resumes exactly there, at the cost of reading
one block again. Without it, the stream is read and decoded again from its start, with the same result.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from lediflow.data.batches import Refusal, TrainingData, draw, position_key, whole_loader
from lediflow.data.decode import BrokenImage, BrokenImageError, Crop, decode
from lediflow.data.listing import open_with_home
from lediflow.data.opening import picture_name
from lediflow.errors import UserError
from lediflow.files import quoted
from lediflow.pictures import to_float

# So many pictures stand for the whole set where statistics of it are wanted.
SAMPLE = 20_000
BLOCK_BYTES = 256 * 2**20  # stored bytes that a worker holds: 1,000 pictures of 268 kB
_HOPELESS = 1000  # broken pictures in a row, after which no readable one is expected
_FEW = 100  # pictures seen, below which a share of broken ones means little


class StreamData(TrainingData):
    """Pictures of one size in the order of a stream; broken ones are passed over.

    Attributes:
        class_names: names of the classes, or their numbers; empty without classes.
        num_classes: how many.
        broken: the broken pictures met so far.
        seen: how many pictures were met so far.
    """

    cached = False

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
        shuffle_block: int = 1000,
        block_bytes: int = BLOCK_BYTES,
        classes: int = 0,
    ) -> None:
        """Open DATASET as a stream.

        Args:
            dataset: as for :func:`open_dataset`.
            image_size: side S in pixels.
            channels: 1 for grey, 3 for RGB.
            split: ``train`` or ``validation``.
            crop: ``center`` or ``random``.
            flip: mirror half of the pictures left to right.
            max_broken: the largest share of broken pictures to put up with, 0 to 1.
            shuffle_block: how many stored pictures a worker holds and shuffles at a time, at most.
            block_bytes: a block ends with the picture with which it has as many stored bytes.
            classes: how many classes there are where labels are plain numbers, which a stream cannot count;
                a picture with a label beyond is passed over.

        Raises:
            UserError: nothing there, no pictures in it, or no such split.
        """
        self.rows, self.home = open_with_home(dataset, split, streaming=True)
        self.commit = self.home.commit
        self.name, self.image_size, self.channels = dataset, image_size, channels
        self.crop, self.flip = crop, flip
        self.shuffle_block, self.block_bytes = shuffle_block, block_bytes
        label = self.rows.features.get("label")
        numbers = [str(i) for i in range(classes)] if label is not None else []
        self.class_names = list(getattr(label, "names", None) or numbers)
        self.num_classes = len(self.class_names)
        self.broken: list[BrokenImage] = []
        self.seen = 0
        self._max_broken = max_broken
        self._first = torch.empty(0), torch.empty(0, dtype=torch.int64)

    def first(self, count: int) -> Tensor:
        """The first readable pictures, at most ``count``, float32 (n, C, S, S) in [-1, 1]."""
        return self._head(count)[0][:count]

    def first_labels(self, count: int) -> Tensor:
        """The classes of ``first``, int64 (n,)."""
        return self._head(count)[1][:count]

    def _head(self, count: int) -> tuple[Tensor, Tensor]:
        if len(self._first[1]) < count:
            batch = next(self._parts(count, 0, once=True))["batch"]
            flipped = batch["flipped"][:, None, None, None]
            images = torch.where(flipped, batch["image"].flip(-1), batch["image"])
            self._first = to_float(images), batch["label"]
        return self._first

    def in_order(self, batch_size: int, *, mirror: bool = False, workers: int = 0) -> Iterator[Tensor]:
        """Go through at most `SAMPLE` readable pictures of one epoch, float32 (B, C, S, S) at a time."""
        for part in islice(self._parts(batch_size, workers, once=True), max(1, SAMPLE // batch_size)):
            images = to_float(part["batch"]["image"])
            # those that came mirrored are turned back, or the others after them
            back = part["batch"]["flipped"] != mirror
            yield torch.where(back[:, None, None, None], images.flip(-1), images)

    def show(self, items: Tensor) -> Tensor:
        """Pictures are visible as they are."""
        return items

    def serve(self, *, batch_size, seed, start, stop, workers, rank, world_size, position=None):
        """Yield this rank's part of the batches; see `batches`.

        Args:
            batch_size: on all ranks together.
            seed: as for `batches`.
            start: as for `batches`.
            stop: as for `batches`.
            workers: loading processes; no more are started than this rank has shards.
            rank: as for `batches`.
            world_size: as for `batches`.
            position: what the last batch before ``start`` on this rank had under ``"position"``, with the
                same seed. With another number of ranks or workers, a new epoch begins instead.
        """
        local, wanted = batch_size // world_size, stop - start
        parts = self._parts(
            local, workers, seed=seed, start=start, rank=rank, ranks=world_size, position=position
        )
        for part in islice(parts, wanted):
            yield {**part["batch"], "image": to_float(part["batch"]["image"]), "position": part["position"]}

    def _parts(
        self,
        size: int,
        workers: int,
        *,
        seed: int = 0,
        start: int = 0,
        rank: int = 0,
        ranks: int = 1,
        position: dict[str, Any] | None = None,
        once: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Yield the batches from step `start` on, each with the position behind it."""
        from datasets.distributed import split_dataset_by_node

        workers = min(workers, split_dataset_by_node(self.rows, rank, ranks).num_shards)
        streams = max(1, workers)
        places = [{"epoch": 0, "state": None, "taken": 0, "count": 0} for _ in range(streams)]
        replay = position is None and start > 0
        if position is not None:
            if (position["ranks"], len(position["places"])) == (ranks, streams):
                places = list(position["places"])
            else:
                warnings.warn(
                    f"the stream was left by {position['ranks']} processes with {len(position['places'])} "
                    f"workers and resumes with {ranks} and {streams}: it starts a new epoch",
                    stacklevel=3,
                )
                epoch = 1 + max(place["epoch"] for place in position["places"])
                places = [{**place, "epoch": epoch} for place in places]
        source = _Source(self, size, seed, 0 if replay else start, rank, ranks, places, once)
        loader = whole_loader(source, workers) if workers else source
        step = 0 if replay else start
        for part in loader:
            if part is None:
                continue
            if isinstance(part, Refusal):
                raise UserError(part.message)
            self._note(part)
            places = [part["place"] if i == part["stream"] else place for i, place in enumerate(places)]
            if step >= start:
                yield {"batch": part["batch"], "position": {"ranks": ranks, "places": places}}
            step += 1

    def _note(self, part: dict[str, Any]) -> None:
        if part["broken"] and not self.broken:
            first = part["broken"][0]
            warnings.warn(
                f"an image in {quoted(self.name)} cannot be read and is passed over: {first.name} "
                f"({first.reason}); later ones are only counted",
                stacklevel=4,
            )
        self.broken += part["broken"]
        self.seen += len(part["broken"]) + len(part["batch"]["label"])
        if self.seen >= _FEW and len(self.broken) > self._max_broken * self.seen:
            raise UserError(
                f"{len(self.broken):,} of {self.seen:,} images in {quoted(self.name)} cannot be read: "
                f"{_listed(self.broken)}; mend or remove them"
            )


class _Source(IterableDataset):
    """One rank's endless batches, made by stream w for steps w, w + n, ... where there are n workers."""

    def __init__(
        self,
        data: StreamData,
        size: int,
        seed: int,
        start: int,
        rank: int,
        ranks: int,
        places: list[dict[str, Any]],
        once: bool,
    ) -> None:
        self.data, self.size, self.seed, self.start = data, size, seed, start
        self.rank, self.ranks, self.places, self.once = rank, ranks, places, once

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        stream = info.id if info else 0
        if stream < self.start % len(self.places):
            yield None  # its turn in this round was before the start
        try:
            yield from self._batches(stream)
        except UserError as error:
            yield Refusal(str(error))
        except Exception as error:  # fsspec, tarfile, the network and datasets each raise their own kinds
            yield Refusal(f"cannot read {quoted(self.data.name)}: {str(error) or type(error).__name__}")

    def _batches(self, stream: int) -> Iterator[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        broken: list[BrokenImage] = []
        place, in_a_row, served = self.places[stream], 0, False
        for row, key, place in self._shuffled(stream):
            try:
                items.append(self._item(row, key, len(items)))
                in_a_row = 0
            except BrokenImageError as error:
                name = picture_name(row["image"], place["count"] + place["taken"])
                broken.append(BrokenImage(name, str(error)))
                in_a_row += 1
                if in_a_row >= _HOPELESS:
                    raise self._hopeless(broken) from None
            if len(items) == self.size:
                yield {"batch": default_collate(items), "stream": stream, "place": place, "broken": broken}
                items, broken, served = [], [], True
        if items:
            yield {"batch": default_collate(items), "stream": stream, "place": place, "broken": broken}
        elif broken and not served:
            raise self._hopeless(broken)

    def _hopeless(self, broken: list[BrokenImage]) -> UserError:
        return UserError(
            f"no image in {quoted(self.data.name)} can be read: {_listed(broken)}; mend or remove them"
        )

    def _item(self, row: dict[str, Any], key: int, index: int) -> dict[str, Any]:
        data = self.data
        flipped, crop_key = draw(key, data.flip)
        label = row.get("label", 0)
        if label is None or label < 0:
            raise BrokenImageError("its label is missing or negative")
        if data.num_classes and label >= data.num_classes:
            raise BrokenImageError(f"its label is {label}, and there are {data.num_classes} classes")
        pixels = decode(
            row["image"],
            image_size=data.image_size,
            channels=data.channels,
            crop=data.crop,
            key=crop_key,
            home=data.home,
        )
        image = torch.from_numpy(pixels)
        return {
            "image": image.flip(-1) if flipped else image,
            "label": label,
            "index": index,
            "flipped": flipped,
        }

    def _shuffled(self, stream: int) -> Iterator[tuple[dict[str, Any], int, dict[str, Any]]]:
        """Yield the stored pictures in their order of serving, each with its key and the place behind it."""
        from datasets.distributed import split_dataset_by_node

        epoch, state, taken, count = (self.places[stream][k] for k in ("epoch", "state", "taken", "count"))
        while True:
            # a fresh object, since workers share the epoch of the one they were started with
            rows = split_dataset_by_node(self.data.rows, self.rank, self.ranks)
            # datasets orders the shards by this number, alike on all ranks; 0 would leave them in order
            rows.set_epoch(1 + position_key(self.seed, epoch) % (2**31 - 1))
            if state is not None:
                rows.load_state_dict(state)
            source, before = iter(rows), count
            while block := self._block(source):
                who = (self.seed % 2**64, self.rank, stream, count)
                order = np.random.default_rng(who).permutation(len(block))
                for turn in range(taken, len(block)):
                    place = {"epoch": epoch, "state": state, "taken": turn + 1, "count": count}
                    yield (
                        block[order[turn]],
                        position_key(self.seed, self.rank, stream, count + turn),
                        place,
                    )
                count, state, taken = count + len(block), rows.state_dict(), 0
            if count == before and state is None:
                raise UserError(
                    f"{quoted(self.data.name)} holds no images for one of its readers; use fewer workers"
                )
            if self.once:
                return
            epoch, state, taken = epoch + 1, None, 0

    def _block(self, source: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        """Take the rows that are shuffled together; where a block ends follows from the rows alone."""
        block, size = [], 0
        for row in islice(source, self.data.shuffle_block):
            block.append(row)
            size += len((row["image"] or {}).get("bytes") or b"")
            if size >= self.data.block_bytes:
                break
        return block


def _listed(broken: list[BrokenImage]) -> str:
    return ", ".join(f"{image.name} ({image.reason})" for image in broken[:5]) + (
        ", ..." if len(broken) > 5 else ""
    )
