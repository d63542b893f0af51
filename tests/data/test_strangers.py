"""Data from strangers: what a file is, where a row may point, how much memory a picture may take."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib
from typing import ClassVar

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from test_broken import png_of_size

from lediflow.data.batches import batches
from lediflow.data.images import BrokenImageError, ImageData, decode
from lediflow.data.inspect import inspect_dataset
from lediflow.data.listing import open_dataset
from lediflow.data.streams import StreamData, _Source
from lediflow.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    datasets.disable_progress_bars()


def stored(kind: str = "PNG", size=(16, 16), mode: str = "RGB", color=0, **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind, **options)
    return file.getvalue()


def blank_png(side: int, kind: int, depth: int, channels: int, rows: int) -> bytes:
    """A black PNG, cut short where `rows` is less than its side; kind 0 is grey, 6 is RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + side * channels * depth // 8)
    pixels = b"".join(packer.compress(row) for _ in range(rows)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def read(data: bytes, size: int = 8, channels=3, **options) -> np.ndarray:
    return decode({"bytes": data, "path": None}, image_size=size, channels=channels, **options)


# Formats

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
UNWANTED = {
    "eps": EPS,
    "fits": stored("PNG").replace(b"\x89PNG", b"SIMPLE"),
    "ico": stored("ICO"),
    "pcx": stored("PCX"),
    "im": stored("IM"),
    "sgi": stored("SGI"),
    "dds": stored("DDS"),
}


@pytest.fixture
def no_programs(monkeypatch):
    """Fail the test where Pillow starts a program; Ghostscript counts as installed."""
    from PIL import EpsImagePlugin

    started = []
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: started.append(a))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a))
    yield
    assert not started, f"started {started}"


@pytest.mark.parametrize("name", UNWANTED)
def test_formats_that_are_not_named_are_no_pictures(name, no_programs):
    with pytest.raises(BrokenImageError, match="not a picture"):
        read(UNWANTED[name])


@pytest.mark.parametrize("where", ["folder", "parquet", "tar", "stream"])
def test_postscript_under_another_name_never_reaches_ghostscript(where, tmp_path, no_programs):
    cells = [{"bytes": EPS, "path": "0.jpg"}] + [{"bytes": stored(), "path": f"{n}.jpg"} for n in (1, 2, 3)]
    if where == "folder":
        for cell in cells:
            (tmp_path / cell["path"]).write_bytes(cell["bytes"])
    elif where == "parquet":
        datasets.Dataset.from_dict({"image": cells}).to_parquet(tmp_path / "a.parquet")
    else:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for cell in cells:
                entry = tarfile.TarInfo(cell["path"])
                entry.size = len(cell["bytes"])
                tar.addfile(entry, io.BytesIO(cell["bytes"]))
    with pytest.warns(UserWarning, match=r"0\.jpg \(not a picture\)"):
        if where == "stream":
            data = StreamData(str(tmp_path), image_size=8)
            next(batches(data, batch_size=3, seed=0, stop=1))
        else:
            data = ImageData(str(tmp_path), image_size=8)
    assert [image.reason for image in data.broken] == ["not a picture"]
    assert [reason for _, reason in inspect_dataset(str(tmp_path)).broken] == ["not a picture"]


def test_a_folder_of_other_formats_holds_no_images(tmp_path):
    (tmp_path / "figure.eps").write_bytes(EPS)
    with pytest.raises(UserError, match=r"no images .*figure\.eps"):
        open_dataset(str(tmp_path))


def test_every_format_that_the_docs_name_is_read(tmp_path):
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"):
        if kind not in Image.SAVE:
            continue  # a Pillow built without it
        pixels = read(stored(kind, color=(200, 30, 30)))
        assert np.abs(pixels[:, 4, 4].astype(int) - [200, 30, 30]).max() < 8, kind


# Memory

PEAK = """
import resource, sys, warnings
warnings.simplefilter("ignore")
import lediflow.data.decode as d
d.decode({"bytes": open(sys.argv[1], "rb").read(), "path": None}, image_size=8, channels=3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    try:
        pixels = d.decode({"bytes": open(path, "rb").read(), "path": None}, image_size=64, channels=3)
        print("read", int(pixels.mean()))
    except d.BrokenImageError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def peak(tmp_path, *pictures: bytes) -> tuple[list[str], int]:
    """Decode pictures in a process of its own; what became of each, and the growth of memory in MB."""
    resource = pytest.importorskip("resource")
    assert resource
    paths = [tmp_path / f"{n}" for n in range(len(pictures) + 1)]
    for path, data in zip(paths, (stored(), *pictures), strict=True):
        path.write_bytes(data)
    command = [sys.executable, "-c", PEAK, *map(str, paths)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return lines[:-1], int(lines[-1])


def test_bombs_just_under_pillow_s_limit_are_refused_undecoded_or_take_their_pixels_alone(tmp_path):
    colour, grey = blank_png(13377, 6, 8, 4, 9), blank_png(13377, 0, 16, 1, 13377)
    assert len(grey) < 400_000
    (said,), megabytes = peak(tmp_path, colour)
    assert "13377x13377" in said and "MB" in said
    assert megabytes < 50
    (said,), megabytes = peak(tmp_path, grey)
    assert said == "read 0" and megabytes < 450, "it was 4,800 MB"


@pytest.mark.parametrize("mode", ["I;16", "P", "RGB"])
def test_a_large_picture_takes_little_more_than_its_pixels(tmp_path, mode):
    options = {"transparency": 5} if mode == "P" else {}
    large = stored(
        "PNG", (8000, 8000), mode, {"I;16": 257 * 90, "P": 0, "RGB": (90, 90, 90)}[mode], **options
    )
    (said,), megabytes = peak(tmp_path, large)
    assert said == ("read 0" if mode == "P" else "read 90")
    pixels = {"I;16": 2, "P": 1, "RGB": 4}[mode] * 64
    assert megabytes < pixels + 120, "it was 32 bytes a pixel: 2,000 MB"


def test_a_large_jpeg_is_read_smaller_and_a_progressive_one_counts_its_coefficients(tmp_path):
    plain = stored("JPEG", (9000, 9000), "RGB", (90, 90, 90))
    (said,), megabytes = peak(tmp_path, plain)
    assert said == "read 90" and megabytes < 100
    dense = stored("JPEG", (10000, 10000), "RGB", (90, 90, 90), progressive=True, subsampling=0)
    (said,), megabytes = peak(tmp_path, dense)
    assert "10000x10000" in said and megabytes < 50


@pytest.mark.parametrize("kind", ["WEBP", "JPEG2000", "AVIF"])
def test_formats_that_decode_to_several_copies_are_refused_earlier(tmp_path, kind):
    if kind not in Image.SAVE:
        pytest.skip("a Pillow built without it")
    said, megabytes = peak(tmp_path, stored(kind, (7000, 7000)))
    assert "7000x7000" in said[0] and megabytes < 50


def test_pillow_s_own_limit_is_left_as_it_was_and_holds_too(monkeypatch):
    assert Image.MAX_IMAGE_PIXELS == 1024 * 1024 * 1024 // 4 // 3
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as other libraries do
    with pytest.raises(BrokenImageError, match="20000x20000"):
        read(png_of_size(20_000, 20_000))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BrokenImageError, match="bomb"):
        read(stored())


def test_too_little_memory_for_one_picture_is_its_fault_alone(monkeypatch, tmp_path):
    from PIL import ImageFile

    def load(self):
        raise MemoryError

    (tmp_path / "0.png").write_bytes(stored())
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(UserError, match="not enough memory"):
        ImageData(str(tmp_path), image_size=8)


def test_tiles_are_what_the_whole_picture_would_be(monkeypatch):
    import lediflow.data.decode as module

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (168, 228, 4), dtype=np.uint8))
    deep = Image.fromarray(np.random.default_rng(1).integers(0, 65536, (168, 228), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    for picture, options in ((noise, {"exif": exif.tobytes()}), (deep, {}), (noise.convert("P"), {})):
        file = io.BytesIO()
        picture.save(file, "PNG", **options)
        whole = read(file.getvalue(), 16)
        monkeypatch.setattr(module, "_TILE", 37)
        tiled = read(file.getvalue(), 16)
        monkeypatch.undo()
        assert np.abs(whole.astype(int) - tiled).max() <= 1


def test_streams_hold_a_bounded_number_of_bytes(tmp_path):
    rows = [{"bytes": stored(color=(n, 0, 0)) + bytes(10_000), "path": None} for n in range(40)]
    datasets.Dataset.from_dict({"image": rows}).to_parquet(tmp_path / "a.parquet")
    data = StreamData(str(tmp_path), image_size=8, block_bytes=50_000)
    held, block = [], _Source._block
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Source, "_block", lambda *a: held.append(block(*a)) or held[-1])
        whole = list(batches(data, batch_size=8, seed=0, stop=10))
    assert max(map(len, held)) == 5, "the picture that fills the block is in it"
    levels = [round(x) for b in whole for x in ((b["image"][:, 0, 0, 0] + 1) * 127.5).tolist()]
    assert sorted(levels[:40]) == sorted(levels[40:]) == list(range(40))
    position = json.loads(json.dumps(whole[5]["position"]))
    rest = list(batches(data, batch_size=8, seed=0, start=6, stop=10, position=position))
    for a, b in zip(whole[6:], rest, strict=True):
        assert torch.equal(a["image"], b["image"])


# Rows that name a file instead of holding it


@pytest.fixture
def private(tmp_path):
    path = tmp_path / "private" / "passport.png"
    path.parent.mkdir()
    path.write_bytes(stored(color=(255, 0, 0)))
    return path


def table_of_paths(folder, paths, kind="parquet"):
    folder.mkdir(exist_ok=True)
    cells = pa.array([{"bytes": None, "path": str(path)} for path in paths], datasets.Image().pa_type)
    table = pa.table({"image": cells})
    if kind == "parquet":
        pq.write_table(table, folder / "a.parquet")
    else:
        with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)
    return folder


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_only_files_below_the_dataset_s_folder_are_opened(tmp_path, private, kind):
    mine = tmp_path / "set" / "pictures" / "0.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(stored(color=(0, 255, 0)))
    link = mine.with_name("link.png")
    link.symlink_to(private)
    outside = [private, f"file://{private}", "../private/passport.png", link, "pictures/link.png"]
    missing = "pictures/none.png"
    table_of_paths(tmp_path / "set", [mine, "pictures/0.png", *outside, missing], kind)
    table = str(next((tmp_path / "set").glob("a.*")))
    with pytest.warns(UserWarning, match="6 of 8"):
        data = ImageData(table, image_size=8, max_broken=0.9)
    assert data.images[:, :, 0, 0].tolist() == [[0, 255, 0]] * 2, "a relative path starts at the folder"
    reasons = [image.reason for image in data.broken]
    assert all("not below the dataset's own folder" in r or "not the dataset's own" in r for r in reasons[:5])
    assert "No such file" in reasons[5]
    stream = StreamData(table, image_size=8, max_broken=0.9)
    with pytest.warns(UserWarning):
        batch = next(batches(stream, batch_size=2, seed=0, stop=1))
    assert batch["image"][:, 1].min() == 1 and batch["image"][:, 0].max() == -1
    assert [reason for _, reason in inspect_dataset(table).broken] == reasons


def test_a_lone_file_s_folder_is_its_own_and_a_url_has_none(tmp_path, private):
    mine = tmp_path / "set" / "0.png"
    mine.parent.mkdir()
    mine.write_bytes(stored())
    table_of_paths(tmp_path / "set", [mine])
    file = tmp_path / "set" / "a.parquet"
    assert len(ImageData(str(file), image_size=8)) == 1
    with pytest.raises(UserError, match="names a file"):
        ImageData(f"file://{file}", image_size=8)


class FakeHub(MemoryFileSystem):
    protocol = "hf"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("hf://"))


@pytest.fixture
def hub(monkeypatch):
    """A Hub in memory; `hub(paths)` makes owner/set a stream whose rows are those paths."""
    fsspec.register_implementation("hf", FakeHub, clobber=True)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a/0.png", stored(color=(0, 255, 0)))
    with fsspec.open("hf://datasets/owner/set@main/x.zip", "wb") as file:
        file.write(archive.getvalue())
    with fsspec.open("hf://datasets/owner/other@main/x.zip", "wb") as file:
        file.write(archive.getvalue())

    def rows(paths):
        table = datasets.Dataset.from_dict(
            {"image": [{"bytes": None, "path": str(path)} for path in paths]},
            features=datasets.Features({"image": datasets.Image()}),
        )

        def load(name, config, *, split, streaming, revision):
            return table.to_iterable_dataset() if streaming else table

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config, revision: ["train"])
        monkeypatch.setattr("lediflow.data.listing.dataset_commit", lambda name, revision: None)

    yield rows
    fsspec.register_implementation("hf", "huggingface_hub.HfFileSystem", clobber=True)
    FakeHub.store.clear()


def test_archives_of_the_hub_stream_and_lead_nowhere_else(hub, private):
    good = "zip://a/0.png::hf://datasets/owner/set@main/x.zip"
    wrong = [
        str(private),
        f"file://{private}",
        f"zip://a/0.png::file://{private}",
        "zip://a/0.png::hf://datasets/owner/other@main/x.zip",
        "zip://a/0.png::hf://datasets/owner/set@main/../other@main/x.zip",
        "http://localhost:1/x.png",
        "simplecache://::hf://datasets/owner/set@main/x.zip",
    ]
    hub([good, *wrong, "zip://none.png::hf://datasets/owner/set@main/x.zip", good])
    data = StreamData("owner/set", image_size=8, max_broken=0.9)
    with pytest.warns(UserWarning, match="passed over"):
        batch = next(batches(data, batch_size=2, seed=0, stop=1))
    assert batch["image"][:, 1].min() == 1 and batch["image"][:, 0].max() == -1
    assert len(torch.cat(list(data.in_order(1)))) == 2, "broken ones at the end of a pass are no error"
    reasons = []
    for row in data.rows:
        try:
            decode(row["image"], image_size=8, channels=3, home=data.home)
        except BrokenImageError as error:
            reasons.append(str(error))
    assert len(reasons) == 8 and all("names a file" in reason for reason in reasons[:7]), reasons


def test_pictures_in_the_hub_s_cache_are_opened(hub, monkeypatch, tmp_path, private):
    cache = tmp_path / "downloads"
    cache.mkdir()
    (cache / "0.png").write_bytes(stored())
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache)
    hub([cache / "0.png", private])
    with pytest.warns(UserWarning, match="1 of 2"):
        assert len(ImageData("owner/set", image_size=8)) == 1


def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "0.png").write_bytes(stored())
    done = []

    def look():
        with pytest.warns(UserWarning, match="not a plain file"):
            done.append(len(ImageData(str(tmp_path), image_size=8)))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(20)
    assert done == [1]


def test_cells_of_other_kinds_are_refused_in_words(tmp_path):
    for n, cells in enumerate(
        (
            [{"bytes": 3, "path": "x"}],
            [{"bytes": "text"}],
            [{"bytes": [1, 2]}],
            [{"bytes": stored(), "path": 7}],
            [{"bytes": stored()}],
        )
    ):
        path = tmp_path / f"{n}.parquet"
        datasets.Dataset.from_dict({"image": cells}).to_parquet(path)
        for streaming in (False, True):
            try:
                if streaming:
                    next(batches(StreamData(str(path), image_size=8), batch_size=1, seed=0, stop=1))
                else:
                    ImageData(str(path), image_size=8)
            except UserError:
                pass
