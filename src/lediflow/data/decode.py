"""Stored pictures: which ones a DATASET names, and how one of them becomes a square uint8 array.

`datasets` holds the list, PIL decodes and resamples. What is decided here is what a user's argument
means, and what a picture becomes on the way: turned upright, laid on white where it is transparent,
brought to 8 bits, cropped to a square.
"""

from __future__ import annotations

import glob
import io
import os
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lediflow.errors import UserError

if TYPE_CHECKING:
    import datasets

Crop = Literal["center", "random"]

# PIL first shrinks by whole factors down to this many times the wanted size, then filters. Above 3 the
# difference from filtering every source pixel cannot be seen, and a large photo costs far less.
_REDUCING_GAP = 3.0

# The names a split goes by, in files and in folders; the first one found is taken.
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "test"),
}
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}


def open_dataset(dataset: str, split: str = "train") -> datasets.Dataset:
    """Find the pictures that DATASET names, without decoding any.

    Args:
        dataset: one of

            - ``digits``: scikit-learn's 1,797 handwritten digits, 32x32 grey (1,500 in ``train``, 297 in
              ``validation``); a folder of that name is written ``./digits``;
            - a folder of pictures, searched to any depth in sorted order. If every picture lies in a
              subfolder, the subfolders directly below are the classes. If there are subfolders named
              ``train`` and ``validation`` (or ``val``, ``test``), the one for ``split`` is read;
            - a ``.parquet`` or ``.arrow`` file, a glob of them, or a folder of them. Among several, those
              with the split's name in theirs are read.
        split: ``train``, ``validation`` or another name that the files use.

    Returns:
        A map-style dataset with a column ``image`` (``Image(decode=False)``: bytes and path) and, where
        there are classes, ``label`` (ClassLabel or int).

    Raises:
        UserError: nothing there, no pictures in it, or no such split.
    """
    if dataset == "digits":
        return _open_digits(split)
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _open_folder(path.absolute(), split)
    if path.is_file():
        files = [path]
    elif glob.has_magic(str(path)):
        files = [Path(match) for match in glob.glob(str(path), recursive=True)]
    else:
        raise UserError(
            f"no file or folder {dataset!r}; give 'digits', a folder of images, or Parquet or Arrow files"
        )
    tables = sorted(file for file in files if file.suffix.lower() in _TABLES)
    if not tables:
        raise UserError(
            f"{dataset!r} is no Parquet or Arrow file; give one, or the folder that holds the images"
        )
    return _open_tables(_tables_for(tables, split, dataset))


def _open_digits(split: str) -> datasets.Dataset:
    import datasets
    from sklearn.datasets import load_digits

    digits = load_digits()
    # RandomState's stream is frozen for good, so everybody's validation digits are the same ones.
    order = np.random.RandomState(0).permutation(len(digits.target))
    parts = {"train": order[:1500], "validation": order[1500:]}
    if split not in parts:
        raise UserError(f"'digits' has no split {split!r}; it has 'train' and 'validation'")

    def png(pixels: np.ndarray) -> bytes:
        # Scaled up as floats: 8x8 pixels of 17 grey levels would show steps if rounded first.
        large = Image.fromarray((pixels * (255 / 16)).astype(np.float32)).resize(
            (32, 32), Image.Resampling.BICUBIC
        )
        file = io.BytesIO()
        Image.fromarray(np.rint(np.asarray(large)).clip(0, 255).astype(np.uint8)).save(file, "PNG")
        return file.getvalue()

    rows = parts[split]
    return datasets.Dataset.from_dict(
        {
            "image": [{"bytes": png(digits.images[row]), "path": f"digit-{row:04d}.png"} for row in rows],
            "label": digits.target[rows].tolist(),
        },
        features=datasets.Features(
            {
                "image": datasets.Image(decode=False),
                "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)]),
            }
        ),
    )


def _open_folder(path: Path, split: str) -> datasets.Dataset:
    root = _split_folder(path, split)
    files = _visible_files(root or path)
    if not files:
        raise UserError(f"the folder {str(root or path)!r} is empty; put images in it")
    readable = {ext for ext, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    pictures = [file for file in files if file.suffix.lower() in readable]
    if not pictures:
        tables = [file for file in files if file.suffix.lower() in _TABLES]
        if not tables:
            raise UserError(
                f"no images in {str(root or path)!r}: its {len(files)} file(s) are not images, for example "
                f"{files[0].name!r}; give a folder of PNG, JPEG, WebP or other images"
            )
        return _open_tables(tables if root else _tables_for(tables, split, str(path)))
    if root is None and split != "train":
        raise _no_split(str(path), split, "put the images in subfolders 'train' and 'validation'")
    return _pictures(root or path, pictures)


def _pictures(root: Path, pictures: list[Path]) -> datasets.Dataset:
    # Not the "imagefolder" builder: it copies its listing to a cache and asks for a layout of its own.
    import datasets

    columns: dict[str, list] = {"image": [str(picture) for picture in pictures]}
    features: dict[str, Any] = {"image": datasets.Image(decode=False)}
    parts = [picture.relative_to(root).parts for picture in pictures]
    if all(len(part) > 1 for part in parts):
        names = sorted({part[0] for part in parts})
        number = {name: i for i, name in enumerate(names)}
        columns["label"] = [number[part[0]] for part in parts]
        features["label"] = datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _split_folder(path: Path, split: str) -> Path | None:
    """Return the subfolder that holds a split, or None where the folder is not divided into splits."""
    below = {entry.name.lower(): entry for entry in sorted(path.iterdir()) if entry.is_dir()}
    visible = {name for name in below if not name.startswith(".")}
    train = visible & set(_SPLIT_NAMES["train"])
    # "train" beside "car" and "bus" is a class; alone, or beside "validation" or "test", it is a split.
    if not train or not (visible == train or visible & set(_SPLIT_NAMES["validation"])):
        return None
    for name in _SPLIT_NAMES.get(split, (split.lower(),)):
        if name in visible:
            return below[name]
    raise _no_split(str(path), split, f"make a subfolder {split!r} beside 'train'")


def _visible_files(root: Path) -> list[Path]:
    found: list[Path] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link that leads back up would be walked for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda file: file.relative_to(root).parts)


def _tables_for(tables: list[Path], split: str, dataset: str) -> list[Path]:
    root = os.path.commonpath([file.absolute().parent for file in tables])

    def named(split_name: str) -> list[Path]:
        for name in _SPLIT_NAMES.get(split_name, (split_name.lower(),)):
            # Whole words only: "latest.parquet" is no test split.
            word = re.compile(rf"(?<![a-z]){re.escape(name)}(?![a-z])")
            chosen = [file for file in tables if word.search(os.path.relpath(file, root).lower())]
            if chosen:
                return chosen
        return []

    if chosen := named(split):
        return chosen
    if split != "train":
        raise _no_split(dataset, split, f"give files with {split!r} in their names, or a folder of both")
    held_out = set(named("validation"))
    # A file given by name is meant, whatever it is called.
    return [file for file in tables if file not in held_out] or tables


def _no_split(dataset: str, split: str, remedy: str) -> UserError:
    return UserError(f"{dataset!r} has no split {split!r}; {remedy}")


def _open_tables(files: list[Path]) -> datasets.Dataset:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    suffix = files[0].suffix.lower()
    shown = repr(str(files[0])) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    if any(file.suffix.lower() != suffix for file in files):
        raise UserError(f"{shown} mix Parquet and Arrow files; give one kind")
    try:
        table = datasets.load_dataset(
            _TABLES[suffix], data_files=[glob.escape(str(file.absolute())) for file in files], split="train"
        )
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise UserError(f"cannot read any row of {shown}: {error.__cause__ or error}") from error

    def is_picture(feature: Any) -> bool:
        return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)

    pictures = [name for name, feature in table.features.items() if is_picture(feature)]
    if not pictures:
        columns = ", ".join(table.column_names)
        raise UserError(f"no image column in {shown}: its columns are {columns}; one must hold images")
    image = next((name for name in ("image", "img") if name in pictures), pictures[0])
    label = next((name for name in ("label", "labels", "class") if _is_label(table.features.get(name))), None)
    table = table.select_columns([image, *([label] if label else [])])
    table = table.rename_columns({image: "image", **({label: "label"} if label else {})})
    if label and getattr(table.features["label"], "dtype", "") in ("string", "large_string"):
        table = table.class_encode_column("label")
    return table.cast_column("image", datasets.Image(decode=False))


def _is_label(feature: Any) -> bool:
    return re.fullmatch(r"u?int\d+|string|large_string", str(getattr(feature, "dtype", ""))) is not None


class BrokenImageError(ValueError):
    """A picture cannot be read; the message is the reason."""


@dataclass(frozen=True)
class BrokenImage:
    """A picture that was left out: its file name (or row), and why it could not be read."""

    name: str
    reason: str


def decode(
    record: Mapping[str, Any] | None,
    *,
    image_size: int,
    channels: Literal[1, 3],
    crop: Crop = "center",
    key: int | None = None,
) -> np.ndarray:
    """Decode one picture to a square.

    Args:
        record: ``{"bytes": file contents or None, "path": where to read them if bytes is None}``, as
            ``datasets.Image(decode=False)`` gives it.
        image_size: side S of the square, in pixels.
        channels: 1 for grey, 3 for RGB.
        crop: the largest square in the middle of the picture, or one whose place ``key`` decides.
        key: seed of the random crop; needed for ``crop="random"``.

    Returns:
        uint8 array of shape (channels, S, S).

    Raises:
        BrokenImageError: the picture is missing, truncated, too large for PIL's limit, or not a picture.
        ValueError: a random crop without a key.
    """
    picture = read_picture(record, channels=channels, image_size=image_size)
    return fit_square(picture, image_size, crop=crop, key=key)


def short_side(record: Mapping[str, Any] | None) -> int:
    """Return the shorter side of a picture in pixels, from the file's header alone.

    Raises:
        BrokenImageError: the header cannot be read.
    """
    with _opened(record) as picture:
        return min(picture.size)


def read_picture(
    record: Mapping[str, Any] | None, *, channels: Literal[1, 3], image_size: int
) -> Image.Image:
    """Read one picture, upright, as an 8-bit PIL image of mode ``L`` or ``RGB``.

    A large JPEG may come back smaller than it is stored, but never with a side under ``image_size`` that
    was not so in the file. Only the first frame of an animation is read.

    Args:
        record: as for :func:`decode`.
        channels: 1 for ``L``, 3 for ``RGB``.
        image_size: the size that will be asked of :func:`fit_square`.

    Raises:
        BrokenImageError: the picture cannot be read.
    """
    with _opened(record) as picture:
        enough = int(_REDUCING_GAP * image_size)
        picture.draft(None, (enough, enough))
        return _eight_bit(ImageOps.exif_transpose(picture), channels)


def fit_square(
    picture: Image.Image, image_size: int, *, crop: Crop = "center", key: int | None = None
) -> np.ndarray:
    """Crop the largest square out of a picture and resize it with an antialiased Lanczos filter.

    The crop is taken in the source and only the square is resized, so a picture of 10,000 x 1 pixels
    costs no more than any other.

    Args:
        picture: mode ``L`` or ``RGB``.
        image_size: side S of the result.
        crop: where the square lies along the longer side.
        key: seed of the random crop.

    Returns:
        uint8 array of shape (1 or 3, S, S).

    Raises:
        ValueError: ``crop="random"`` without a key.
    """
    width, height = picture.size
    side = min(width, height)
    if crop == "random":
        if key is None:
            raise ValueError("a random crop needs a key")
        offsets = random.Random(key)
        left, top = offsets.randint(0, width - side), offsets.randint(0, height - side)
    else:
        left, top = (width - side) // 2, (height - side) // 2
    square = picture.resize(
        (image_size, image_size),
        Image.Resampling.LANCZOS,
        box=(left, top, left + side, top + side),
        reducing_gap=_REDUCING_GAP,
    )
    pixels = np.asarray(square)
    if pixels.ndim == 2:
        return pixels[None].copy()
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


@contextmanager
def _opened(record: Mapping[str, Any] | None) -> Iterator[Image.Image]:
    """Open a picture; whatever goes wrong inside the ``with`` block becomes a BrokenImageError."""
    data = record.get("bytes") if record else None
    path = record.get("path") if record else None
    if data is None and not path:
        raise BrokenImageError("no picture in this row")
    if data is not None and len(data) == 0:
        raise BrokenImageError("the file is empty")
    try:
        with Image.open(io.BytesIO(data) if data is not None else str(path)) as picture:
            yield picture
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        # PIL's own text holds the address of a buffer, which differs from run to run.
        raise BrokenImageError("not a picture") from error
    except Exception as error:
        # On damaged files PIL's readers raise OSError, SyntaxError, struct.error, zlib.error, IndexError
        # and others; there is no common class to name.
        raise BrokenImageError(str(error) or type(error).__name__) from error


def _eight_bit(picture: Image.Image, channels: Literal[1, 3]) -> Image.Image:
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _rescaled(picture)
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    if picture.mode not in ("1", "L"):
        # PIL has no direct way from LAB to grey, but it has one to RGB from every mode.
        picture = picture.convert("RGB")
    return picture.convert("L" if channels == 1 else "RGB")


def _rescaled(picture: Image.Image) -> Image.Image:
    """Bring 16-bit, 32-bit and float grey to mode L; PIL's own conversion cuts everything off at 255."""
    values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
    # 16 bits have a white of 65,535 and float pictures usually one of 1.0. Values beyond that follow no
    # convention, so the brightest pixel stands for white.
    usual = 1.0 if picture.mode == "F" else 65535.0
    white = max(usual, float(values.max()))
    return Image.fromarray(np.rint(values.clip(0.0) * (255.0 / white)).astype(np.uint8))
