"""Latents that `lediflow encode` wrote: training reads them with no codec in memory.

A latents folder holds shards `latents-00000-of-00012.parquet`, one row per image, and `latents.json`, written
when the last shard is there. A latent is stored as the raw 16-bit numbers (fp16 or bf16, little-endian, in
the order C, h, w) in a binary cell: `mean`, `mean_flipped` (of the mirrored image), and for codecs with a
variance `log_var` and `log_var_flipped`. `label` is the class (0 without classes), `row` the image's place in
the dataset.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lediflow.codecs import LatentSpace
from lediflow.data.batches import MapData, draw
from lediflow.data.listing import LATENTS_FILE
from lediflow.errors import UserError
from lediflow.gaussian import DiagonalGaussian

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
PATTERN = "latents-*-of-*.parquet"


def is_latents_folder(dataset: str) -> bool:
    """Whether DATASET is a folder that `lediflow encode` made, or began to make."""
    folder = Path(dataset).expanduser()
    return folder.is_dir() and ((folder / LATENTS_FILE).is_file() or any(folder.glob(PATTERN)))


class LatentData(MapData):
    """A codec's latents, normalised per channel to mean 0 and standard deviation 1 over the set.

    Where the codec gave a distribution, every visit draws a latent from it; what is drawn depends on the
    seed and the place in the order alone.

    Attributes:
        meta: what latents.json holds.
        space: codec and scale.
        shape: (C, h, w) of one latent.
        class_names: names of the classes, empty without classes.
        num_classes: how many, 0 without classes.
    """

    def __init__(self, folder: str, *, flip: bool = False, cache_gb: float = 1.0) -> None:
        """Open a latents folder.

        Args:
            folder: what `lediflow encode` wrote.
            flip: serve the latents of the mirrored image half of the time.
            cache_gb: gigabytes (10^9 bytes) that the set may take in memory; if it does not fit, it is read
                from datasets' memory-mapped copy, which takes as much disk space again.

        Raises:
            UserError: the folder is unfinished, or files are missing or damaged.
        """
        self.folder, self.flip = Path(folder).expanduser(), flip
        self.meta = read_meta(self.folder)
        self.space = LatentSpace.from_dict(self.meta)
        side = self.meta["image_size"] // self.space.factor
        self.shape = (self.space.channels, side, side)
        self.class_names = list(self.meta["class_names"])
        self.num_classes = len(self.class_names)
        parts = ["mean", "log_var"] if self.meta["sample"] == "posterior" else ["mean"]
        self._columns = [part + end for end in ("", *(["_flipped"] if flip else [])) for part in parts]
        self._parts, self._dtype = len(parts), DTYPES[self.meta["dtype"]]
        files = sorted(self.folder.glob(PATTERN))
        if len(files) != self.meta["shards"]:
            raise self._damaged(f"{len(files)} of {self.meta['shards']} shards are there")
        self._cells: Tensor | None = None
        self._rows: Any = None
        if self.meta["count"] * len(self._columns) * int(np.prod(self.shape)) * 2 <= cache_gb * 1e9:
            self._hold(files)
        else:
            self._map(files)
        if len(self.labels) != self.meta["count"]:
            raise self._damaged(f"{len(self.labels):,} of {self.meta['count']:,} images are there")
        self.cached = self._cells is not None and self._parts == 1

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Return the latents of (index, key) pairs, float32 (B, C, h, w), with label, index and flipped."""
        draws = [draw(key, self.flip) for _, key in pairs]
        index = torch.tensor([index for index, _ in pairs])
        flipped = torch.tensor([flip for flip, _ in draws])
        encoded = self._encoded(index, flipped)
        latents = encoded.mean
        if self._parts == 2:
            generator = torch.Generator()
            noise = [
                torch.randn(self.shape, generator=generator.manual_seed(bits & (2**63 - 1)))
                for _, bits in draws
            ]
            latents = encoded.at(torch.stack(noise))
        return {
            "image": self.space.normalize(latents),
            "label": self.labels[index],
            "index": index,
            "flipped": flipped,
        }

    def first(self, count: int) -> Tensor:
        """The means of the first latents, at most `count`, normalised, (n, C, h, w)."""
        index = torch.arange(min(count, len(self)))
        return self.space.normalize(self._encoded(index, torch.zeros(len(index), dtype=torch.bool)).mean)

    def first_labels(self, count: int) -> Tensor:
        """The classes of `first`, int64 (n,)."""
        return self.labels[:count]

    def in_order(self, batch_size: int, *, mirror: bool = False, workers: int = 0) -> Iterator[Tensor]:
        """Go through the means once, normalised, (B, C, h, w) at a time; there is nothing for workers to do.

        Raises:
            UserError: mirrored latents of a set that was opened without them.
        """
        if mirror and not self.flip:
            raise UserError("these latents were opened with flip=False")
        for start in range(0, len(self), batch_size):
            index = torch.arange(start, min(start + batch_size, len(self)))
            yield self.space.normalize(self._encoded(index, torch.full((len(index),), mirror)).mean)

    def show(self, items: Tensor) -> Tensor:
        """Decode normalised latents (n, C, h, w) if the codec is on this machine, else show 3 channels.

        The codec is read for this call and given up again, and never downloaded.
        """
        try:
            codec = self.space.load_codec(device=items.device, offline=True)
        except UserError:
            return (items[:, : 3 if items.shape[1] >= 3 else 1] / 3).clamp(-1, 1)
        return codec.decode(self.space.denormalize(items.float()))

    def _encoded(self, index: Tensor, flipped: Tensor) -> DiagonalGaussian:
        """Mean and log-variance of rows, unnormalised float32 (B, C, h, w)."""
        if self._cells is not None:
            cells = self._cells[index]
        else:
            rows = self._rows[index.tolist()]
            cells = torch.stack([_numbers(rows[name], self.shape) for name in self._columns], dim=1)
        first = flipped.long() * self._parts
        place = torch.arange(len(index))
        mean = cells[place, first].view(self._dtype).float()
        if self._parts == 1:
            return DiagonalGaussian(mean, torch.full_like(mean, -torch.inf))
        return DiagonalGaussian(mean, cells[place, first + 1].view(self._dtype).float())

    def _hold(self, files: list[Path]) -> None:
        import pyarrow
        import pyarrow.parquet as pq

        cells, labels = [], []
        try:
            for file in files:
                table = pq.read_table(file, columns=[*self._columns, "label"])
                columns = [_numbers(table[name].to_pylist(), self.shape) for name in self._columns]
                cells.append(torch.stack(columns, dim=1))
                labels += table["label"].to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise self._damaged(str(error)) from None
        self._cells, self.labels = torch.cat(cells), torch.tensor(labels, dtype=torch.int64)

    def _map(self, files: list[Path]) -> None:
        import datasets

        try:
            rows: Any = datasets.load_dataset(
                "parquet", data_files=[str(file) for file in files], split="train"
            )
        except Exception as error:  # datasets, pyarrow and the file system each raise their own kinds
            raise self._damaged(str(error.__cause__ or error)) from None
        self.labels = torch.tensor(rows["label"][:], dtype=torch.int64)
        self._rows = rows.select_columns(self._columns)

    def _damaged(self, reason: str) -> UserError:
        return UserError(
            f"the latents in {self.folder} are damaged ({reason}); delete the damaged shard and latents.json "
            "and give the `lediflow encode` command again: it makes what is missing"
        )


def read_meta(folder: Path) -> dict[str, Any]:
    """Return what latents.json holds.

    Raises:
        UserError: it is not there yet, or damaged.
    """
    try:
        meta: dict[str, Any] = json.loads((folder / LATENTS_FILE).read_text(encoding="utf-8"))
        return meta
    except FileNotFoundError:
        raise UserError(
            f"the latents in {folder} are unfinished; give the same `lediflow encode` command again"
        ) from None
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {folder / LATENTS_FILE}: {error}") from None


def to_cells(latents: Tensor, dtype: str) -> list[bytes]:
    """Round latents (B, C, h, w) to 16 bits and return the cells of a column."""
    return [row.tobytes() for row in latents.to(DTYPES[dtype]).cpu().view(torch.int16).numpy()]


def _numbers(cells: Sequence[bytes], shape: tuple[int, int, int]) -> Tensor:
    """Undo `to_cells`, still as raw 16 bits: int16 (B, C, h, w)."""
    flat = np.frombuffer(b"".join(cells), dtype="<i2")
    return torch.from_numpy(flat.reshape(len(cells), *shape).copy())
