"""One picture -> an 8-bit PIL image of all its pixels, upright and in sRGB, and nothing but its pixels."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageCms

from lediflow.errors import UserError
from lediflow.files import quoted
from lediflow.pipelines.photos import open_photo

_EIGHT_BIT = {"1": "L", "L": "L", "LA": "LA", "RGB": "RGB", "RGBA": "RGBA"}  # every other mode: RGB or RGBA


def read_upright(path: Path) -> Image.Image:
    """Read a picture as a person sees it, at its full size.

    Returns:
        An image of mode L, LA, RGB or RGBA with an empty `info`: turned as its EXIF says, and its colours
        brought from the profile of the camera to sRGB.

    Raises:
        UserError: as `open_photo`, or it has more than 8 bits a channel.
    """
    picture = open_photo(path)
    try:
        return bare(_in_srgb(picture))
    except UserError as error:
        raise UserError(f"cannot use {quoted(path)}: {error}") from None


def bare(picture: Image.Image) -> Image.Image:
    """Return a decoded picture as mode L, LA, RGB or RGBA, without its metadata.

    Raises:
        UserError: it has more than 8 bits a channel.
    """
    if picture.mode == "F" or picture.mode.startswith("I"):
        raise UserError("the picture has more than 8 bits a channel; save it with 8 bits")
    mode = _EIGHT_BIT.get(picture.mode, "RGB")
    if picture.has_transparency_data:
        mode = "LA" if mode in ("L", "LA") else "RGBA"
    converted = picture.convert(mode)
    # a new image, for `info` follows a picture through all that Pillow does with it
    return Image.frombytes(mode, converted.size, converted.tobytes())


def _in_srgb(picture: Image.Image) -> Image.Image:
    profile = picture.info.get("icc_profile")
    if not profile or picture.mode not in ("RGB", "RGBA", "CMYK"):
        return picture
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return picture
        mode = "RGBA" if picture.mode == "RGBA" else "RGB"
        found = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode=mode)
        return found or picture
    except (ImageCms.PyCMSError, OSError):  # a damaged profile: then its numbers are taken for sRGB
        return picture
