"""One stored picture -> a square uint8 array.

PIL decodes and resamples. What is decided here is what a picture becomes on the way: laid on white where it
is transparent, brought to 8 bits, turned upright, cropped to a square. A large picture is worked on tile by
tile, so that beside its decoded pixels there is never a second copy of all of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image

from lediflow.data.opening import (
    NOWHERE,
    BrokenImage,
    BrokenImageError,
    Home,
    load_bounded,
    opened,
)

__all__ = [
    "BrokenImage",
    "BrokenImageError",
    "Crop",
    "decode",
    "describe_picture",
    "eight_bit",
    "fit_square",
    "read_picture",
    "short_side",
]

Crop = Literal["center", "random"]

# PIL first shrinks by whole factors down to this many times the wanted size, then filters. Above 3 the
# difference from filtering every source pixel cannot be seen, and a large photo costs far less.
_REDUCING_GAP = 3.0
_TILE = 1024  # pixels along a side of what is converted at a time
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(
    record: Mapping[str, Any] | None,
    *,
    image_size: int,
    channels: Literal[1, 3],
    crop: Crop = "center",
    key: int | None = None,
    home: Home = NOWHERE,
) -> np.ndarray:
    """Decode one picture to a square.

    Args:
        record: ``{"bytes": file contents or None, "path": where to read them if bytes is None}``, as
            ``datasets.Image(decode=False)`` gives it.
        image_size: side S of the square, in pixels.
        channels: 1 for grey, 3 for RGB.
        crop: the largest square in the middle of the picture, or one whose place ``key`` decides.
        key: seed of the random crop; needed for ``crop="random"``.
        home: where a path may lead; by default no path is followed.

    Returns:
        uint8 array of shape (channels, S, S).

    Raises:
        BrokenImageError: the picture is missing, truncated, too large to decode, not the dataset's own, or
            not a picture.
        ValueError: a random crop without a key.
    """
    picture = read_picture(record, channels=channels, image_size=image_size, home=home)
    return fit_square(picture, image_size, crop=crop, key=key)


def short_side(record: Mapping[str, Any] | None, home: Home = NOWHERE) -> int:
    """Return the shorter side of a picture in pixels, from the file's header alone.

    Raises:
        BrokenImageError: the header cannot be read.
    """
    with opened(record, home) as (picture, _):
        return min(picture.size)


def describe_picture(record: Mapping[str, Any] | None, home: Home = NOWHERE) -> dict[str, Any]:
    """Decode all of a picture and return its stored ``bytes`` (how many), ``format``, ``mode`` and ``size``.

    Raises:
        BrokenImageError: the picture cannot be read.
    """
    with opened(record, home) as (picture, stored):
        size = picture.size
        picture.draft(None, (1, 1))  # a JPEG as small as can be; all of the file is read all the same
        load_bounded(picture, size)
        turned = picture.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8)  # a quarter turn
        return {
            "bytes": stored,
            "format": picture.format,
            "mode": picture.mode,
            "size": size[::-1] if turned else size,
        }


def read_picture(
    record: Mapping[str, Any] | None,
    *,
    channels: Literal[1, 3],
    image_size: int,
    home: Home = NOWHERE,
) -> Image.Image:
    """Read one picture, upright, as an 8-bit PIL image of mode ``L`` or ``RGB``.

    A large picture comes back smaller than it is stored, but never with a side under ``image_size`` that was
    not so in the file. Only the first frame of an animation is read.

    Args:
        record: as for :func:`decode`.
        channels: 1 for ``L``, 3 for ``RGB``.
        image_size: the size that will be asked of :func:`fit_square`.
        home: as for :func:`decode`.

    Raises:
        BrokenImageError: the picture cannot be read.
    """
    with opened(record, home) as (picture, _):
        stored, enough = picture.size, int(_REDUCING_GAP * image_size)
        picture.draft(None, (enough, enough))  # a JPEG can be decoded at 1/2, 1/4 or 1/8 of its size
        factor = max(1, int(min(picture.size) / image_size / _REDUCING_GAP))
        # beside the pixels there will be the result, and the same again while it is turned
        load_bounded(picture, stored, beside=-(-8 // factor**2))
        turn = _UPRIGHT.get(picture.getexif().get(_EXIF_ORIENTATION, 1))
        small = _shrunk(picture, factor, channels)
    return small if turn is None else small.transpose(turn)


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


def eight_bit(picture: Image.Image, channels: Literal[1, 3]) -> Image.Image:
    """Bring a decoded picture of any mode to 8-bit L or RGB, laid on white where it is transparent."""
    return _shrunk(picture, 1, channels)


def _shrunk(picture: Image.Image, factor: int, channels: Literal[1, 3]) -> Image.Image:
    """Bring a picture to 8-bit L or RGB; a large one tile by tile, each side divided by `factor`.

    What is left over in that division is cut off at both ends, less than a third of a pixel of the result.
    """
    white = _white(picture)
    if max(picture.size) <= _TILE:  # `fit_square` does the rest, exactly
        return _eight_bit(picture, channels, white)
    width, height = (side // factor for side in picture.size)
    corner = (picture.width % factor // 2, picture.height % factor // 2)
    whole = (*corner, corner[0] + width * factor, corner[1] + height * factor)
    small = Image.new("L" if channels == 1 else "RGB", (width, height))
    for left, top, tile in _tiles(picture, whole, max(1, _TILE // factor) * factor):
        done = _eight_bit(tile, channels, white)
        place = ((left - corner[0]) // factor, (top - corner[1]) // factor)
        small.paste(done if factor == 1 else done.reduce(factor), place)
    return small


def _tiles(
    picture: Image.Image, box: tuple[int, int, int, int], step: int
) -> Iterator[tuple[int, int, Image.Image]]:
    """Yield left, top and contents of the squares of side `step` that a box of a picture is made of."""
    first, upper, last, lower = box
    for top in range(upper, lower, step):
        for left in range(first, last, step):
            yield left, top, picture.crop((left, top, min(left + step, last), min(top + step, lower)))


def _eight_bit(picture: Image.Image, channels: Literal[1, 3], white: float | None) -> Image.Image:
    if white is not None:
        values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
        picture = Image.fromarray(np.rint(values.clip(0.0, white) * (255.0 / white)).astype(np.uint8))
    if picture.has_transparency_data:
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture.convert("RGBA"))
    if picture.mode not in ("1", "L"):
        # PIL has no direct way from LAB to grey, but it has one to RGB from every mode.
        picture = picture.convert("RGB")
    return picture.convert("L" if channels == 1 else "RGB")


def _white(picture: Image.Image) -> float | None:
    """Return what is white in 16-bit, 32-bit and float grey; None for other modes.

    PIL's own conversion cuts everything off at 255.
    """
    if picture.mode != "F" and not picture.mode.startswith("I"):
        return None
    # 16 bits have a white of 65,535 and float pictures usually one of 1.0. Values beyond that follow no
    # convention, so the brightest pixel stands for white.
    white = 1.0 if picture.mode == "F" else 65535.0
    if picture.mode.startswith("I;16"):
        return white
    tiles = _tiles(picture, (0, 0, *picture.size), _TILE)
    return max(white, *(float(np.nan_to_num(np.asarray(tile)).max()) for _, _, tile in tiles))
