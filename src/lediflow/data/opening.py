"""A stored picture -> an open PIL image: which formats, from where, and how large it may become.

Data comes from strangers. A name says nothing of what a file is, a table's row may point anywhere, and a few
kilobytes may unfold to gigabytes. All of that is decided here, before a pixel is decoded.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote_to_bytes

from PIL import Image, UnidentifiedImageError

from lediflow.files import shown

# What is opened, by PIL's names; docs/data.md lists them. PIL knows many more: some are read by starting
# other programs (EPS: Ghostscript), others by code that few people use or look at.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# Bytes that decoding and shrinking one picture may take, and that its file may have. Enough for 134 million
# pixels of PNG in colour; times eight decoding threads, it still fits in a small machine.
MOST_BYTES = 512 * 2**20
# Decoders of these formats hold several copies of all pixels: bytes a pixel, as measured.
_BYTES_A_PIXEL = {"WEBP": 16, "AVIF": 16, "JPEG2000": 20}
_PIL_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}  # others have 4


class BrokenImageError(ValueError):
    """A picture cannot be read; the message is the reason, fit to be printed."""

    def __init__(self, reason: str) -> None:
        super().__init__(shown(reason))


@dataclass(frozen=True)
class BrokenImage:
    """A picture that was left out: its file name (or row), and why it could not be read."""

    name: str
    reason: str


@dataclass(frozen=True)
class Home:
    """Where the pictures lie that a dataset's rows name instead of holding.

    Attributes:
        folders: local folders; what lies below them once links are followed may be opened.
        url: how the address of a remote file, or of the archive that holds it, must begin; "" for none.
        commit: hash of the commit that a Hub data set was read at; "" for others, and where nobody tells.
        listed: the paths come from a listing of the user's own folder, links and all, and not from the cells
            of a table, which may be anybody's.
    """

    folders: tuple[str, ...] = ()
    url: str = ""
    commit: str = ""
    listed: bool = False

    def open(self, path: str) -> IO[bytes]:
        """Open what a row names, for reading.

        Raises:
            BrokenImageError: it is not the dataset's own, not a plain file, or too large.
            OSError: as the system says.
        """
        if self.listed:
            return _plain(_listed_path(path))
        if "://" in path:
            return self._remote(path)
        for folder in self.folders:
            whole = Path(folder, path).resolve()  # a relative path starts at the dataset's folder
            if whole.is_relative_to(Path(folder).resolve()) and (
                whole.exists() or folder == self.folders[-1]
            ):
                return _plain(whole)
        raise BrokenImageError(
            f"its row names a file, {path}, that is not below the dataset's own folder, so it is not opened"
        )

    def _remote(self, path: str) -> IO[bytes]:
        import fsspec

        *inner, outer = path.split("::")
        ours = self.url and outer.startswith(self.url) and ".." not in outer.split("/")
        if not ours or not all(part.startswith("zip://") for part in inner):
            raise BrokenImageError(
                f"its row names a file, {path}, that is not the dataset's own, so it is not opened"
            )
        with fsspec.open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)  # an archive may say anything of what it holds
        _refuse_stored(len(data))
        return io.BytesIO(data)


NOWHERE = Home()


def row_path(path: Path) -> str:
    """Return a listed file's path as a row can hold it: a `file:` address where the name is not UTF-8."""
    try:
        str(path).encode("utf-8")
        return str(path)
    except UnicodeEncodeError:
        return path.as_uri()


def picture_name(record: Mapping[str, Any] | None, row: int) -> str:
    """Return what to call a picture: its path, fit to be printed, or else its row."""
    path = (record or {}).get("path")
    if not path:
        return f"row {row}"
    return shown(_listed_path(path) if path.startswith("file://") else path)


@contextmanager
def opened(record: Mapping[str, Any] | None, home: Home = NOWHERE) -> Iterator[tuple[Image.Image, int]]:
    """Open a picture and tell the bytes of its file; only the header is read.

    Whatever goes wrong inside the ``with`` block becomes a BrokenImageError.

    Args:
        record: ``{"bytes": file contents or None, "path": where to read them if bytes is None}``.
        home: where such a path may lead; by default nowhere.
    """
    try:
        with ExitStack() as stack:
            file = stack.enter_context(_file(record, home))
            size = file.seek(0, os.SEEK_END)
            picture = stack.enter_context(Image.open(file, formats=_known_formats()))
            yield picture, size
    except BrokenImageError:
        raise
    except MemoryError as error:
        raise BrokenImageError("not enough memory to decode it") from error
    except UnidentifiedImageError as error:
        # PIL's own text holds the address of a buffer, which differs from run to run.
        raise BrokenImageError("not a picture") from error
    except Exception as error:
        # On damaged files PIL's readers raise OSError, SyntaxError, struct.error, zlib.error, IndexError
        # and others; there is no common class to name.
        raise BrokenImageError(str(error) or type(error).__name__) from error


def load_bounded(picture: Image.Image, stored: tuple[int, int], *, beside: int = 0) -> None:
    """Decode an open picture, if there is room for it.

    Args:
        picture: as `opened` gives it, perhaps told by `draft` to be smaller.
        stored: its size in the file.
        beside: bytes a pixel of what the caller makes of it at the same time.

    Raises:
        BrokenImageError: all that would take more than `MOST_BYTES`.
    """
    needed = picture.width * picture.height * (_bytes_a_pixel(picture) + beside)
    if picture.info.get("progressive"):
        # its coefficients are all held at once, at full size: two bytes a pixel and band
        needed += stored[0] * stored[1] * 2 * len(picture.getbands())
    if needed > MOST_BYTES:
        raise BrokenImageError(
            f"too large: {stored[0]}x{stored[1]} pixels would take {needed / 1e6:,.0f} MB to decode, and "
            f"{MOST_BYTES / 1e6:,.0f} MB are allowed"
        )
    picture.load()


def _bytes_a_pixel(picture: Image.Image) -> int:
    own = _PIL_BYTES.get(picture.mode, 4)
    if picture.format in ("TIFF", "BMP"):  # a strip, or an unpacked run, may be all of it
        return 2 * own
    return _BYTES_A_PIXEL.get(picture.format or "", own)


def _file(record: Mapping[str, Any] | None, home: Home) -> IO[bytes]:
    data = record.get("bytes") if record else None
    path = record.get("path") if record else None
    if data is not None:
        if len(data) == 0:
            raise BrokenImageError("the file is empty")
        _refuse_stored(len(data))
        return io.BytesIO(data)
    if not path:
        raise BrokenImageError("no picture in this row")
    return home.open(path)


def _listed_path(path: str) -> Path:
    # a listed path is absolute, so nothing else begins like this; see `row_path`
    return Path(os.fsdecode(unquote_to_bytes(path[7:]))) if path.startswith("file://") else Path(path)


def _plain(path: Path) -> IO[bytes]:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, a device may never end
        raise BrokenImageError("not a plain file")
    _refuse_stored(found.st_size)
    return open(path, "rb")


def _refuse_stored(size: int) -> None:
    if size > MOST_BYTES:
        raise BrokenImageError(f"too large: its file has more than {MOST_BYTES / 1e6:,.0f} MB")


def _known_formats() -> list[str]:
    """Return those of `FORMATS` that this Pillow was built with; PIL raises KeyError on others."""
    if not _KNOWN:
        Image.init()
        _KNOWN.extend(name for name in FORMATS if name in Image.OPEN)
    return _KNOWN


_KNOWN: list[str] = []


def picture_suffixes() -> set[str]:
    """Return the endings of file names, with the dot and in small letters, by which pictures are found."""
    known = _known_formats()
    return {ending for ending, kind in Image.registered_extensions().items() if kind in known}
