"""Latents that `lediflow encode` wrote: training reads them with no codec in memory.

A latents folder holds shards `latents-00000-of-00012.parquet`, one row per image, and `latents.json`, written
when the last shard is there. A latent is stored as the raw 16-bit numbers (fp16 or bf16, little-endian, in
the order C, h, w) in a binary cell: `mean`, `mean_flipped` (of the mirrored image), and for codecs with a
variance `log_var` and `log_var_flipped`; for pairs also `low` and `low_flipped`, the means of the same image
made small and encoded (or, enlarged again as an image, encoded once more). `label` is the class (0 without
classes), `row` the image's place in the dataset, `text` what it shows in words, where that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from torch import Tensor

from lediflow.codecs import CodecSpace
from lediflow.data.batches import MapData, draw
from lediflow.data.listing import LATENTS_FILE
from lediflow.errors import UserError
from lediflow.files import shown
from lediflow.gaussian import DiagonalGaussian

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
PATTERN = "latents-*-of-*.parquet"


def is_codec_latents(dataset: str) -> bool:
    """Whether DATASET is a folder that `lediflow encode` made, or began to make."""
    folder = Path(dataset).expanduser()
    return folder.is_dir() and ((folder / LATENTS_FILE).is_file() or any(folder.glob(PATTERN)))


class CodecLatents(MapData):
    """A codec's latents, normalised per channel to mean 0 and standard deviation 1 over the set.

    Where the codec gave a distribution, every visit draws a latent from it; what is drawn depends on the
    seed and the place in the order alone.

    Attributes:
        meta: what latents.json holds.
        space: codec and scale.
        shape: (C, h, w) of one latent.
        class_names: names of the classes, empty without classes.
        num_classes: how many, 0 without classes.
        texts: what each image shows, empty where none were kept.
        pairs: pixels of the small and of the large image, and "latents" or "pixels", for what `low` is; None
            for latents without partners.
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
        self.space = CodecSpace.from_dict(self.meta)
        self.commit = self.meta["commit"]
        side = self.meta["image_size"] // self.space.factor
        self.shape = (self.space.channels, side, side)
        self.class_names = list(self.meta["class_names"])
        self.num_classes = len(self.class_names)
        parts = ["mean", "log_var"] if self.meta["sample"] == "posterior" else ["mean"]
        self._columns = [part + end for end in ("", *(["_flipped"] if flip else [])) for part in parts]
        self._parts, self._dtype = len(parts), DTYPES[self.meta["dtype"]]
        self._low_columns: list[str] = []
        self.pairs: tuple[int, int, str] | None = None
        if (low := self.meta["low_size"]) is not None:
            self.pairs = low, self.meta["image_size"], self.meta["enlarge"]
            low_side = side if self.meta["enlarge"] == "pixels" else low // self.space.factor
            self._low_shape = (self.space.channels, low_side, low_side)
            self._low_columns = ["low", *(["low_flipped"] if flip else [])]
        self.texts: list[str] = []
        self._kept = ["label", *(["text"] if self.meta["text"] is not None else [])]
        files = sorted(self.folder.glob(PATTERN))
        if len(files) != self.meta["shards"]:
            raise _damaged(self.folder, f"{len(files)} of {self.meta['shards']} shards are there")
        self._cells: Tensor | None = None
        self._low_cells: Tensor | None = None
        self._rows: Any = None
        numbers = len(self._columns) * int(np.prod(self.shape))
        if self._low_columns:
            numbers += len(self._low_columns) * int(np.prod(self._low_shape))
        if self.meta["count"] * numbers * 2 <= cache_gb * 1e9:
            self._hold(files)
        else:
            self._map(files)
        if len(self.labels) != self.meta["count"]:
            raise _damaged(self.folder, f"{len(self.labels):,} of {self.meta['count']:,} images are there")
        self.cached = self._cells is not None and self._parts == 1

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Return the latents of (index, key) pairs, float32 (B, C, h, w), with label, index and flipped.

        Of a set of pairs also `low`, the partners, normalised like the others.
        """
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
        found = {
            "image": self.space.normalize(latents),
            "label": self.labels[index],
            "index": index,
            "flipped": flipped,
        }
        return found if self.pairs is None else {**found, "low": self._low(index, flipped)}

    def first(self, count: int) -> Tensor:
        """The means of the first latents, at most `count`, normalised, (n, C, h, w)."""
        index = torch.arange(min(count, len(self)))
        return self.space.normalize(self._encoded(index, torch.zeros(len(index), dtype=torch.bool)).mean)

    def first_low(self, count: int) -> Tensor:
        """The partners of `first`, normalised, (n, C, h', w')."""
        index = torch.arange(min(count, len(self)))
        return self._low(index, torch.zeros(len(index), dtype=torch.bool))

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
        cells = self._read(index, self._cells, self._columns, self.shape)
        first = flipped.long() * self._parts
        place = torch.arange(len(index))
        mean = cells[place, first].view(self._dtype).float()
        if self._parts == 1:
            return DiagonalGaussian(mean, torch.full_like(mean, -torch.inf))
        return DiagonalGaussian(mean, cells[place, first + 1].view(self._dtype).float())

    def _low(self, index: Tensor, flipped: Tensor) -> Tensor:
        """The partners of rows, normalised float32 (B, C, h', w')."""
        cells = self._read(index, self._low_cells, self._low_columns, self._low_shape)
        low = cells[torch.arange(len(index)), flipped.long()].view(self._dtype).float()
        return self.space.normalize(low)

    def _read(
        self, index: Tensor, held: Tensor | None, columns: list[str], shape: tuple[int, int, int]
    ) -> Tensor:
        """The cells of some columns of rows, raw 16 bits (B, columns, *shape)."""
        if held is not None:
            return held[index]
        rows = self._rows[index.tolist()]
        try:
            return torch.stack([_numbers(rows[name], shape) for name in columns], dim=1)
        except (TypeError, ValueError) as error:  # in memory, this was found at the start
            raise _damaged(self.folder, str(error)) from None

    def _hold(self, files: list[Path]) -> None:
        import pyarrow.parquet as pq

        cells, low_cells, labels = [], [], []
        try:
            for file in files:
                table = pq.read_table(file, columns=[*self._columns, *self._low_columns, *self._kept])
                columns = [_numbers(table[name].to_pylist(), self.shape) for name in self._columns]
                cells.append(torch.stack(columns, dim=1))
                low = [_numbers(table[name].to_pylist(), self._low_shape) for name in self._low_columns]
                low_cells += [torch.stack(low, dim=1)] if low else []
                labels += table["label"].to_pylist()
                self.texts += table["text"].to_pylist() if "text" in self._kept else []
            self._cells, self.labels = torch.cat(cells), torch.tensor(labels, dtype=torch.int64)
            self._low_cells = torch.cat(low_cells) if low_cells else None
        except Exception as error:  # pyarrow, NumPy and torch each raise their own kinds on foreign cells
            raise _damaged(self.folder, str(error) or type(error).__name__) from None

    def _map(self, files: list[Path]) -> None:
        import datasets

        try:
            rows: Any = datasets.load_dataset(
                "parquet", data_files=[str(file) for file in files], split="train"
            )
            self.labels = torch.tensor(rows["label"][:], dtype=torch.int64)
            self.texts = list(rows["text"][:]) if "text" in self._kept else []
            self._rows = rows.select_columns([*self._columns, *self._low_columns])
        except Exception as error:  # datasets, pyarrow and the file system each raise their own kinds
            raise _damaged(self.folder, str(error.__cause__ or error) or type(error).__name__) from None


class _Meta(BaseModel):
    """What latents.json must hold; it may hold more."""

    model_config = ConfigDict(strict=True, extra="allow")
    codec: str
    hash: str
    latent_hash: str = ""
    factor: PositiveInt
    channels: PositiveInt
    mean: list[FiniteFloat]
    std: list[Annotated[FiniteFloat, Field(gt=0)]]
    image_size: PositiveInt
    dtype: Literal["fp16", "bf16"]
    sample: Literal["mode", "posterior"]
    low_size: PositiveInt | None = None
    enlarge: Literal["latents", "pixels"] = "latents"
    text: str | None = None
    class_names: list[str]
    commit: str = ""
    count: PositiveInt
    shards: PositiveInt

    @model_validator(mode="after")
    def _fits(self) -> _Meta:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std must have {self.channels} channels")
        if self.image_size % self.factor:
            raise ValueError(f"image_size {self.image_size} must be a multiple of factor {self.factor}")
        return self


def read_meta(folder: Path) -> dict[str, Any]:
    """Return what latents.json holds.

    Raises:
        UserError: it is not there yet, or damaged.
    """
    path = folder / LATENTS_FILE
    try:
        return _Meta.model_validate_json(path.read_bytes()).model_dump()
    except FileNotFoundError:
        raise UserError(
            f"the latents in {shown(folder)} are unfinished; give the same `lediflow encode` command again"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {shown(path)}: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise _damaged(folder, f"{LATENTS_FILE}: {key + ': ' if key else ''}{first['msg']}") from None


def _damaged(folder: Path, reason: str) -> UserError:
    return UserError(
        f"the latents in {shown(folder)} are damaged ({shown(reason)}); delete the damaged shard and "
        "latents.json and give the `lediflow encode` command again: it makes what is missing"
    )


def to_cells(latents: Tensor, dtype: str) -> list[bytes]:
    """Round latents (B, C, h, w) to 16 bits and return the cells of a column."""
    return [row.tobytes() for row in latents.to(DTYPES[dtype]).cpu().view(torch.int16).numpy()]


def _numbers(cells: Sequence[bytes], shape: tuple[int, int, int]) -> Tensor:
    """Undo `to_cells`, still as raw 16 bits: int16 (B, C, h, w)."""
    flat = np.frombuffer(b"".join(cells), dtype="<i2")
    return torch.from_numpy(flat.reshape(len(cells), *shape).copy())
