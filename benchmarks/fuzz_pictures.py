"""For fuzz.py: files that are pictures, or were, in Hypothesis' strategies.

What is drawn never depends on the bytes made so far, which differ between versions of Pillow.
"""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

FORMATS = (
    *("PNG", "PNG", "JPEG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "TIFF", "PPM", "JPEG2000", "AVIF"),
    *("EPS", "ICO"),
)
MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "I;16")
MAGIC = (
    *(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"RIFF\0\0\0\0WEBP"),
    *(b"P6\n", b"P5 1 1 255\n", b"Pf\n", b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    *(b"\0\0\0 ftypavif", b"%!PS-Adobe", b""),
)
SIZES = st.one_of(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.just((1, 3000)), st.just((3000, 1)))
LIES = st.sampled_from([0, 1, 2, 255, 4096, 16383, 65535, 70_000, 2**24, 2**31 - 1, 2**32 - 1])


@st.composite
def picture_bytes(draw: Any) -> bytes:
    """A file that is a picture, or was one."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.sampled_from(MAGIC)) + draw(st.binary(max_size=300))
    data = _saved(
        draw(st.sampled_from(FORMATS)),
        draw(st.sampled_from(MODES)),
        draw(SIZES),
        noise=draw(st.booleans()),
        orientation=draw(st.one_of(st.none(), st.integers(0, 9), st.just(65_535))),
        options=draw(st.sampled_from(OPTIONS)),
        frames=draw(st.sampled_from([1, 1, 1, 3])),
    )
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        data = draw(st.sampled_from(DAMAGES))(draw, data)
    return data


OPTIONS = (
    {},
    {},
    {"progressive": True},
    {"transparency": 0},
    {"compression": "tiff_lzw"},
    {"compression": "tiff_deflate"},
    {"compression": "jpeg"},
    {"lossless": True},
    {"bits": 2},
)


def _saved(kind: str, mode: str, size: tuple[int, int], *, noise, orientation, options, frames) -> bytes:
    if kind == "AVIF":  # Pillow's encoder, not its decoder, crashes on some sizes
        mode, size, options, frames = "RGB", (32, 32), {}, 1
    if options.get("compression") == "jpeg":  # libtiff's encoder breaks the heap on long ones
        mode, size = "RGB", (32, 32)
    picture = Image.new("RGB", size, (200, 120, 40))
    if noise:
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    picture = (
        picture.convert("L").convert(mode) if mode in ("I", "F", "I;16", "LA", "PA") else _as(picture, mode)
    )
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {**options, "exif": exif.tobytes()}
    if frames > 1:
        options = {**options, "save_all": True, "append_images": [picture.copy()] * (frames - 1)}
    for chosen, attempt in ((mode, options), (mode, {}), ("RGB", {}), ("L", {})):
        file = io.BytesIO()
        try:
            (picture if chosen == mode else picture.convert("RGB").convert(chosen)).save(
                file, kind, **attempt
            )
            return file.getvalue()
        except Exception:  # not every format has every mode and option
            continue
    return b""


def _as(picture: Image.Image, mode: str) -> Image.Image:
    if mode != "LAB":
        return picture.convert(mode)
    from PIL import ImageCms

    way = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    return ImageCms.applyTransform(picture, way) or picture


PLACE = st.one_of(
    st.integers(1, 10**6), st.integers(1, 10**3).map(lambda n: n * 1000)
)  # millionths of a file


def _at(place: int, data: bytes) -> int:
    return place * len(data) // 10**6


def cut(draw: Any, data: bytes) -> bytes:
    """Leave the end out."""
    return data[: _at(draw(PLACE), data)]


def flip(draw: Any, data: bytes) -> bytes:
    """Change some bytes, most often of the header."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 8))):
        place, value, among = draw(PLACE), draw(st.integers(0, 255)), draw(st.sampled_from([40, 200, 10**9]))
        if changed:
            changed[place % min(len(changed), among)] = value
    return bytes(changed)


def splice(draw: Any, data: bytes) -> bytes:
    """Put other bytes in the middle, or take some out."""
    at = _at(draw(PLACE), data)
    return data[:at] + draw(st.binary(max_size=60)) + data[at + draw(st.integers(0, 60)) :]


def lie(draw: Any, data: bytes) -> bytes:
    """Promise another width and height."""
    width, height, tag = draw(LIES), draw(LIES), draw(st.sampled_from([256, 257, 277, 278]))
    if data.startswith(b"\x89PNG") and len(data) > 33:
        header = b"IHDR" + struct.pack(">II", width % 2**32, height % 2**32) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    if data.startswith(b"GIF8"):
        return data[:6] + struct.pack("<HH", width % 65536, height % 65536) + data[10:]
    if data.startswith(b"BM"):
        return data[:18] + struct.pack("<ii", min(width, 2**31 - 1), -min(height, 2**31 - 1)) + data[26:]
    if data.startswith((b"P5", b"P6")):
        return data[:3] + f"{width} {height}\n255\n".encode() + data[-20:]
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        if (at := data.find(marker)) > 0:
            return data[: at + 5] + struct.pack(">HH", height % 65536, width % 65536) + data[at + 9 :]
    if data[:4] in (b"II*\0", b"MM\0*"):
        order = "<" if data[:1] == b"I" else ">"
        at = data.rfind(struct.pack(order + "HHI", tag, 4, 1))
        at = at if at > 0 else data.rfind(struct.pack(order + "HHI", 256, 3, 1))
        return data[: at + 8] + struct.pack(order + "I", width % 2**32) + data[at + 12 :] if at > 0 else data
    return (
        data[: len(data) // 3]
        + struct.pack("<II", width % 2**32, height % 2**32)
        + data[len(data) // 3 + 8 :]
    )


DAMAGES = (cut, flip, splice, lie, lie)


@st.composite
def picture_case(draw: Any) -> dict[str, Any]:
    return {
        "data": draw(picture_bytes()),
        "image_size": draw(st.sampled_from([1, 7, 64, 700])),
        "channels": draw(st.sampled_from([1, 3])),
        "key": draw(st.one_of(st.none(), st.integers(0, 2**64 - 1))),
    }


def check_picture(case: dict[str, Any], folder: Path) -> None:
    from lediflow.data.decode import BrokenImageError, decode, describe_picture, short_side

    record, size = {"bytes": case["data"], "path": None}, case["image_size"]
    crop = "center" if case["key"] is None else "random"
    for look in (short_side, describe_picture):
        try:
            look(record)
        except BrokenImageError as error:
            assert str(error).isprintable(), "a reason that cannot be printed"
    try:
        pixels = decode(record, image_size=size, channels=case["channels"], crop=crop, key=case["key"])
    except BrokenImageError:
        return
    assert pixels.shape == (case["channels"], size, size) and pixels.dtype == "uint8"


@st.composite
def mask_case(draw: Any) -> dict[str, Any]:
    return {
        "photo": draw(picture_bytes()),
        "mask": draw(st.one_of(picture_bytes(), st.sampled_from(["alpha", "the photo itself"]))),
        "model": draw(st.sampled_from([(16, 16), (64, 64), (8, 24)])),
        "padding": draw(st.one_of(st.none(), st.integers(-1, 40))),
        "feather": draw(st.integers(-1, 9)),
        "channels": draw(st.sampled_from([1, 3])),
    }


def check_mask(case: dict[str, Any], folder: Path) -> None:
    """What inpainting does of a photo and a mask but for the network, whose output is noise here."""
    import torch

    from lediflow.pipelines import photos

    (folder / "photo.png").write_bytes(case["photo"])
    photo: Any = photos.open_photo(folder / "photo.png")
    if max(photo.size) > 1024:
        return  # the pictures family decodes those
    mask = photo if case["mask"] == "the photo itself" else case["mask"]
    if isinstance(mask, bytes):
        (folder / "mask.png").write_bytes(mask)
        mask = photos.open_photo(folder / "mask.png")
    pixels = photos.photo_tensor(photo, case["channels"])
    generate = photos.mask_tensor(mask, photo, (pixels.shape[1], pixels.shape[2]))
    region = photos.region_around(photos.feathered(generate, case["feather"]), case["padding"], case["model"])
    seen = photos.covered(region.cut(generate)[None] > 0, case["model"])
    assert seen.shape == (1, 1, *case["model"]) and bool(seen.any())
    made = torch.rand(1, case["channels"], *case["model"]) * 2 - 1
    whole = photos.pasted(pixels, made, generate, region)
    kept = (generate == 0).expand_as(pixels)
    assert torch.equal(whole[0][kept], pixels[kept]), "a pixel outside of the mask changed"
