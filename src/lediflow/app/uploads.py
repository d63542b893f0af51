"""What a visitor hands over: pictures and painted masks, opened with the limits of the page."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lediflow.app.limits import Limits
from lediflow.data.opening import BrokenImageError, Home, load_bounded, opened, row_path
from lediflow.errors import UserError
from lediflow.files import quoted, shown
from lediflow.pipelines.photos import listed_photo, open_photo

LEAST_SHOWN, MOST_SHOWN = 512, 1024  # pixels of the longer side of what is painted on
_MOST_LAYER = 2048 * 2048


def open_upload(path: str | Path | None, limits: Limits) -> Image.Image:
    """Open a picture that was uploaded, upright, in its own mode.

    Raises:
        UserError: none was given, or it is no picture, damaged, animated, or too large.
    """
    if not path:
        raise UserError("choose a picture first")
    path = Path(path)
    record = {"bytes": None, "path": row_path(path.absolute())}
    try:
        with opened(record, Home(listed=True)) as (picture, _):
            width, height = picture.size
    except BrokenImageError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):  # so large that Pillow reads no header
            raise _too_large(path, "it is far too large", limits) from None
        raise UserError(f"{quoted(path.name)} cannot be used: {_named(error, path)}") from None
    if width * height > limits.pixels:
        raise _too_large(path, f"it is {width:,} x {height:,} pixels large", limits)
    try:
        return open_photo(path)
    except UserError as error:
        raise UserError(_named(error, path)) from None


def input_of(path: str | Path) -> dict[str, Any]:
    """Return how a recipe names an uploaded file: its name without folders, and a digest of its contents.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with listed_photo(Path(path)) as file:
            digest = hashlib.sha256(file.read()).hexdigest()
    except (OSError, BrokenImageError):
        raise UserError(f"{quoted(Path(path).name)} cannot be read any more; upload it again") from None
    return {"path": shown(Path(path).name), "sha256": digest}


def to_paint_on(picture: Image.Image) -> Image.Image:
    """Return a picture at a size at which one can paint: small ones enlarged without smoothing."""
    side = max(picture.size)
    colours = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    if side < LEAST_SHOWN:
        times = -(-LEAST_SHOWN // side)
        size = (picture.width * times, picture.height * times)
        return colours.resize(size, Image.Resampling.NEAREST)
    if side <= MOST_SHOWN:
        return colours
    size = (
        max(1, round(picture.width * MOST_SHOWN / side)),
        max(1, round(picture.height * MOST_SHOWN / side)),
    )
    return colours.resize(size, Image.Resampling.LANCZOS)


def painted_mask(painted: Mapping[str, Any] | None, size: tuple[int, int]) -> Image.Image:
    """Return what was painted as a mask of a picture: mode L, 255 where paint lies and 0 elsewhere.

    The editor gives layers of the size that it shows, perhaps none or smaller ones; only the first one's
    alpha counts, brought to the picture's size without smoothing.

    Args:
        painted: "layers", of which each is the bytes of a picture or None.
        size: (W, H) of the picture.

    Raises:
        UserError: nothing was painted, or a layer is no picture.
    """
    layers = [layer for layer in (painted or {}).get("layers") or () if layer]
    nothing = UserError("nothing is painted: paint over what is to be made anew, or upload a mask")
    if not layers:
        raise nothing
    try:
        with opened({"bytes": layers[0], "path": None}) as (picture, _):
            if picture.width * picture.height > _MOST_LAYER:
                raise BrokenImageError("it is too large")
            load_bounded(picture, picture.size)
            alpha = np.asarray(picture.convert("RGBA").getchannel("A"))
    except BrokenImageError:
        raise UserError("what was painted did not arrive whole; paint again") from None
    mask = Image.fromarray(np.where(alpha >= 128, 255, 0).astype(np.uint8))
    mask = mask.resize(size, Image.Resampling.NEAREST)
    if mask.getbbox() is None:
        raise nothing
    return mask


def _too_large(path: Path, what: str, limits: Limits) -> UserError:
    most = f"at most {limits.pixels / 1e6:,.0f} million pixels are allowed here"
    return UserError(f"{quoted(path.name)} cannot be used: {what}, and {most}; make it smaller first")


def _named(error: Exception, path: Path) -> str:
    """Return a message with a file's name in place of where it lies on this machine."""
    return str(error).replace(shown(path.absolute()), shown(path.name)).replace(str(path.parent) + "/", "")
