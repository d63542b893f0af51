"""Photos at full size: turned, in sRGB, of few modes, with nothing but their pixels."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from lediflow.errors import UserError
from lediflow.pipelines.upright import read_upright

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def png_of(width, height):
    """The beginning of a grey PNG, which says its size."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))


def test_it_is_turned_as_exif_says_and_loses_what_else_the_file_tells(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    exif[0x010F] = "maker of the camera"
    exif.get_ifd(0x8825)[1] = "N"  # place
    text = PngInfo()
    text.add_text("Author", "somebody")
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif, pnginfo=text, dpi=(72, 72))
    assert {"Author", "exif", "dpi"} <= Image.open(tmp_path / "a.png").info.keys()
    photo = read_upright(tmp_path / "a.png")
    assert np.array_equal(np.asarray(photo), np.rot90(PIXELS, -1))
    assert photo.info == {}
    assert not photo.getexif()


@pytest.mark.parametrize(
    ("stored", "mode"),
    [("1", "L"), ("L", "L"), ("LA", "LA"), ("P", "RGB"), ("RGB", "RGB"), ("RGBA", "RGBA"), ("CMYK", "RGB")],
)
def test_modes(tmp_path, stored, mode):
    path = tmp_path / ("a.tif" if stored == "CMYK" else "a.png")
    picture = Image.fromarray(PIXELS).convert(stored)
    picture.save(path)
    photo = read_upright(path)
    assert photo.mode == mode
    assert np.array_equal(np.asarray(photo), np.asarray(picture.convert(mode)))


def test_a_transparent_palette_keeps_its_transparency(tmp_path):
    picture = Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7)).convert("P")
    picture.save(tmp_path / "a.png", transparency=3)
    photo = read_upright(tmp_path / "a.png")
    assert photo.mode == "RGBA"
    assert [(np.asarray(photo)[..., 3] == 0).sum(), photo.getpixel((3, 0))[3]] == [1, 0]


def test_colours_come_to_srgb_and_those_in_it_stay_bit_for_bit(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = Image.fromarray(PIXELS)
    picture.save(tmp_path / "srgb.png", icc_profile=srgb)
    picture.save(tmp_path / "damaged.png", icc_profile=b"no profile")
    assert np.array_equal(np.asarray(read_upright(tmp_path / "srgb.png")), PIXELS)
    assert np.array_equal(np.asarray(read_upright(tmp_path / "damaged.png")), PIXELS)
    swapped = srgb.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))  # its name
    swapped = swapped.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")
    picture.save(tmp_path / "swapped.png", icc_profile=swapped)
    converted = read_upright(tmp_path / "swapped.png")
    np.testing.assert_allclose(np.asarray(converted, int), PIXELS[..., ::-1].astype(int), atol=2)
    assert converted.info == {}


def test_what_would_lose_pixels_is_refused(tmp_path):
    frames = [Image.new("L", (4, 4), 40 * i) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="it is animated"):
        read_upright(tmp_path / "a.gif")
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="more than 8 bits"):
        read_upright(tmp_path / "a.png")
    (tmp_path / "large.png").write_bytes(png_of(20_000, 20_000))
    with pytest.raises(UserError, match="20000x20000|exceeds limit"):
        read_upright(tmp_path / "large.png")
    (tmp_path / "b.png").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="not a picture"):
        read_upright(tmp_path / "b.png")
