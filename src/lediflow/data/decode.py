"""One stored picture -> a square uint8 array.

PIL decodes and resamples. What is decided here is what a picture becomes on the way: turned upright, laid
on white where it is transparent, brought to 8 bits, cropped to a square.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Crop = Literal["center", "random"]

# PIL first shrinks by whole factors down to this many times the wanted size, then filters. Above 3 the
# difference from filtering every source pixel cannot be seen, and a large photo costs far less.
_REDUCING_GAP = 3.0


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


def describe_picture(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """Decode a picture whole and return its stored ``bytes`` (how many), ``format``, ``mode`` and ``size``.

    Raises:
        BrokenImageError: the picture cannot be read.
    """
    with _opened(record) as picture:
        picture.load()
        data = (record or {}).get("bytes")
        stored = len(data) if data is not None else os.path.getsize((record or {})["path"])
        turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF's orientation: a quarter turn
        size = picture.size[::-1] if turned else picture.size
        return {"bytes": stored, "format": picture.format, "mode": picture.mode, "size": size}


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
