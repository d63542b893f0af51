"""A folder of everything that goes wrong with picture files, and of what only looks as if it did."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lediflow.data.images import ImageData, batches
from lediflow.data.inspect import contact_sheet, inspect_dataset
from lediflow.errors import UserError


def picture(seed: int = 0, size: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def stored(kind: str, image: Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    (image or picture()).save(file, kind, **options)
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that promises many pixels in a few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped_in_the_middle(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(255 - b for b in data[middle : middle + 40]) + data[middle + 40 :]


# what each broken file is said to be
BROKEN = {
    "truncated.jpg": (half(stored("JPEG", quality=95)), "truncated"),
    "truncated.png": (half(stored("PNG")), "truncated"),
    "truncated.webp": (half(stored("WEBP")), ""),
    "truncated.gif": (half(stored("GIF")), "truncated"),
    "truncated.tif": (half(stored("TIFF")), ""),
    "only-a-header.jpg": (stored("JPEG")[:30], ""),
    "damaged.png": (flipped_in_the_middle(stored("PNG")), ""),
    "empty.jpg": (b"", "not a picture"),
    "text.png": (b"just words\n", "not a picture"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not a picture"),
    "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not a picture"),
    "zeros.png": (bytes(4096), "not a picture"),
    "archive.jpg": (b"PK\x03\x04" + bytes(200), "not a picture"),
    "bomb.png": (png_of_size(60_000, 60_000), "bomb"),
    "short-of-data.png": (png_of_size(64, 64), "truncated"),
}


def odd_but_readable() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = Image.new("P", (48, 48), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    deep = Image.fromarray(np.full((48, 48), 257 * 100, dtype=np.uint16))
    return {
        "cmyk.jpg": stored("JPEG", picture().convert("CMYK")),
        "16-bit.png": stored("PNG", deep),
        "palette.png": stored("PNG", palette, transparency=0),
        "rotated.jpg": stored("JPEG", picture().resize((64, 48)), exif=exif.tobytes()),
        "animated.gif": stored("GIF", save_all=True, append_images=[picture(1), picture(2)]),
        "alpha.png": stored("PNG", picture().convert("RGBA")),
        "one-bit.png": stored("PNG", picture().convert("1")),
        "one-pixel.png": stored("PNG", picture(size=1)),
        "really-a-png.jpg": stored("PNG"),
        "SHOUTING.JPG": stored("JPEG"),
        "progressive.jpg": stored("JPEG", progressive=True),
    }


@pytest.fixture
def wreckage(tmp_path):
    """A folder with all of it; what is broken by name, and how many are readable."""
    root = tmp_path / "wreckage"
    root.mkdir()
    for name, (data, _) in BROKEN.items():
        (root / name).write_bytes(data)
    readable = odd_but_readable()
    for name, data in readable.items():
        (root / name).write_bytes(data)
    broken = {name: reason for name, (_, reason) in BROKEN.items()}
    (root / "folder.jpg").mkdir()  # neither broken nor a class
    (root / "notes.txt").write_text("no picture, and not said to be one")
    (root / ".hidden.png").write_bytes(b"not looked at")
    try:
        (root / "dangling.png").symlink_to(root / "nowhere.png")
        broken["dangling.png"] = "No such file"
    except OSError:
        pass  # a system without links
    (root / "forbidden.png").write_bytes(stored("PNG"))
    (root / "forbidden.png").chmod(0)
    if os.access(root / "forbidden.png", os.R_OK):  # nothing is forbidden to root
        (root / "forbidden.png").unlink()
    else:
        broken["forbidden.png"] = "Permission denied"
    return root, broken, len(readable)


def test_every_broken_file_is_named_with_its_reason_and_the_odd_ones_are_read(wreckage):
    root, broken, readable = wreckage
    assert len(broken) + readable >= 26
    with pytest.warns(UserWarning, match="cannot be read and are left out"):
        data = ImageData(str(root), image_size=32, max_broken=0.9)
    found = {Path(image.name).name: image.reason for image in data.broken}
    assert found.keys() == broken.keys()
    for name, reason in broken.items():
        assert reason in found[name], name
    assert len(data) == readable and data.num_small == 1 and data.num_classes == 0
    batch = next(batches(data, batch_size=readable, seed=0, stop=1))
    assert batch["image"].shape == (readable, 3, 32, 32) and batch["image"].abs().max() <= 1


def test_too_many_stop_the_run_with_a_list(wreckage):
    root, broken, readable = wreckage
    with pytest.raises(UserError, match=rf"{len(broken)} of {len(broken) + readable} images.*\.\.\.; mend"):
        ImageData(str(root), image_size=32, max_broken=0.3)


@pytest.mark.parametrize("workers", [0, 2])
def test_inspection_finds_the_same_with_and_without_workers(wreckage, workers):
    root, broken, readable = wreckage
    report = inspect_dataset(str(root), workers=workers)
    assert {Path(name).name for name, _ in report.broken} == broken.keys()
    assert report.images == len(broken) + readable
    assert sum(report.formats.values()) == readable == sum(report.sizes.values())
    assert report.modes["CMYK"] == 1 and report.modes["1"] == 1 and report.sizes["48x64"] == 1
    assert report.short_side == (1, 48, 48)
    text = report.to_text()
    assert f"{readable} readable of" in text and "page.jpg: not a picture" in text
    assert contact_sheet(str(root)).width > 500


def test_rows_in_order_leave_the_broken_ones_out(wreckage):
    root, broken, readable = wreckage
    data = ImageData(str(root), image_size=16, max_broken=0.9, cache_gb=0)
    index = [i for _, rows in data.readable(range(len(data)), 4) for i in rows.tolist()]
    again = [i for _, rows in data.readable(range(len(data)), 7, workers=2) for i in rows.tolist()]
    assert index == again == sorted(index) and len(index) == readable
    assert {Path(image.name).name for image in data.broken_rows().values()} == broken.keys()
    assert sum(len(part) for part in data.in_order(5)) == readable


def test_a_classed_set_counts_readable_pictures_by_class(tmp_path):
    for name, data in (("a/0.png", stored("PNG")), ("a/1.png", b"x"), ("b/0.png", stored("PNG"))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    report = inspect_dataset(str(tmp_path))
    assert report.classes == {"a": 1, "b": 1} and len(report.broken) == 1
    assert report.bytes == 2 * len(stored("PNG"))
    assert contact_sheet(str(tmp_path)).size == (2 * 98, 110)
