"""Write beside, then rename into place: a reader, or a process killed midway, never meets half a file."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lediflow.errors import UserError

_UNFINISHED = re.compile(r"\..+-[0-9a-f]{32}(\.\w+)?")  # the names that `written_whole` makes up
REQUEST = "request.json"
_PROBE_BYTES = 2**20
_JOINERS = "\u200c\u200d"  # not printable by themselves, but part of names in Persian, Hindi and emoji


def shown(name: object) -> str:
    r"""Return a file name, or another text from outside, as it may be printed.

    Line breaks, a terminal's escape sequences and marks that turn the direction of writing become ``\n``,
    ``\x1b`` and ``\u202e``; bytes that are not UTF-8 become ``\xe9``. All else stays as it is.
    """
    return "".join(char if char.isprintable() or char in _JOINERS else _escaped(char) for char in str(name))


def quoted(name: object) -> str:
    """Return a file name in quotation marks, as it may be printed."""
    return f"'{shown(name)}'"


def _escaped(char: str) -> str:
    byte = ord(char) - 0xDC00  # how Python holds a byte that is not UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else ascii(char)[1:-1]


@contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn the system's refusal to write into a UserError that names `target`."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's error in its own
        raise UserError(
            f"cannot write {shown(target)}: {shown(error)}; free some space or choose another --output"
        ) from None


def read_json(path: Path, advice: str) -> dict[str, Any] | None:
    """Return the JSON object of a file, None if there is none.

    Args:
        path: of the file.
        advice: what the user should do where it is damaged.

    Raises:
        UserError: it is not the text of a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {shown(path)}: {shown(error)}; {advice}") from None
    if not isinstance(found, dict):
        raise UserError(f"cannot read {shown(path)}: it is no JSON object; {advice}")
    return found


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, if it is there, without those cut short or damaged."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict)]


def default_cache() -> Path:
    """Return the folder of what can be computed again: lediflow in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lediflow"


def check_output(folder: Path) -> None:
    """Make a folder, if it is not there, and write a megabyte to it that is removed at once.

    For commands that write only after long work: call this before.

    Raises:
        UserError: it is no folder, is read-only, or its disk is full.
    """
    probe = folder / f".probe-{uuid.uuid4().hex}"
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".probe-*"):  # by a killed process; who writes to one now misses nothing
            left.unlink(missing_ok=True)
        try:
            with open(probe, "wb") as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())  # some systems tell only now
        finally:
            probe.unlink(missing_ok=True)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to, and move it there if nothing is raised; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays last, for Pillow and matplotlib choose the format by it
    unfinished = path.with_name(f".{path.stem}-{uuid.uuid4().hex}{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
        _sync(unfinished)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill(folder)` write a folder beside `target`, then put it in place of what is there.

    On Linux's usual file systems one system call exchanges the two, so `target` is at every moment the old
    folder or the new one. Elsewhere the old one steps aside under another name first; a process killed just
    then leaves it there, where `readable_folder(target)` finds it, and `settle(target)`, which the next
    `write_folder` calls, brings it back.

    Raises:
        UserError: the disk is full or the folder cannot be written; `target` is as it was.
    """
    fresh, old = _fresh(target), _old(target)
    with explained(target):
        settle(target)
        try:
            fresh.mkdir(parents=True)
            fill(fresh)
            for path in (*fresh.rglob("*"), fresh):
                _sync(path)
            if not target.exists():
                fresh.rename(target)
            elif not _exchange(fresh, target):
                target.rename(old)
                fresh.rename(target)
            _sync(target.parent)
        finally:
            settle(target)


def readable_folder(target: Path) -> Path:
    """Return where to read what `write_folder(target)` wrote: `target`, or where a killed process left it."""
    old = _old(target)
    return old if old.is_dir() and not target.exists() else target


def settle(target: Path) -> None:
    """Bring back the folder that a killed `write_folder(target)` had put aside, and remove what else it left.

    For whoever will write there, such as a run that starts again; readers use `readable_folder`.
    """
    old = _old(target)
    if readable_folder(target) == old:
        old.rename(target)
    for left in (_fresh(target), old):
        if left.is_symlink():  # `target` was one, and has been exchanged
            left.unlink(missing_ok=True)
        shutil.rmtree(left, ignore_errors=True)


def remove_folder(target: Path) -> None:
    """Remove a folder under another name, so that what a killed process leaves is not taken for it."""
    gone = target.with_name(f".{target.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)  # left by a process killed here before
    target.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Remove what killed processes left in `folder`, and bring back what they were about to replace.

    For folders in which nobody else keeps hidden files, such as those of a run.
    """
    clear_files(folder)
    for path in sorted(folder.glob(".*")):
        if path.suffix in (".new", ".old") and path.is_dir():
            settle(path.with_name(path.stem[1:]))
        elif path.suffix == ".gone":
            shutil.rmtree(path, ignore_errors=True)


def clear_files(folder: Path, *, of: Path | None = None, older_than: float = 0.0) -> None:
    """Remove the files that killed processes left half-written in `folder`, known by names that we make up.

    Args:
        folder: where nobody is writing now, unless one of the following says more.
        of: only what was to become this file.
        older_than: seconds that nobody has written to it.
    """
    for path in folder.glob(f".{of.stem}-*{of.suffix}" if of else ".*"):
        with suppress(FileNotFoundError):  # somebody else clears too
            if (
                _UNFINISHED.fullmatch(path.name)
                and path.is_file()
                and time.time() - path.stat().st_mtime >= older_than
            ):
                path.unlink()


def claim_folder(
    output: Path,
    request: Mapping[str, Any],
    results: Callable[[Path], Iterable[Path]],
    *,
    called: str,
    overwrite: bool = False,
) -> None:
    """Make `output` the folder of a request, in which the results of two requests are never mixed.

    Args:
        output: folder; it may hold a part of the same request.
        request: all that its results depend on; plain values for JSON, kept in request.json.
        results: gives the files of results in a folder.
        called: what they are called.
        overwrite: remove those of another request.

    Raises:
        UserError: it holds results of another request, or cannot be written.
    """
    with explained(output):
        output.mkdir(parents=True, exist_ok=True)
        clear_files(output)
        there, text = list(results(output)), json.dumps(dict(request), indent=1)
        earlier, now = _read_request(output), json.loads(text)
        if there and earlier != now:
            if not overwrite:
                raise UserError(
                    f"{shown(output)} holds {called} of another request ({_difference(earlier, now)}); give "
                    "--overwrite to replace what is there, or another --output"
                )
            for path in there:
                path.unlink(missing_ok=True)
        write_text(output / REQUEST, text)


def _read_request(output: Path) -> dict[str, Any]:
    try:
        earlier = json.loads((output / REQUEST).read_text(encoding="utf-8"))
        return earlier if isinstance(earlier, dict) else {}
    except (OSError, ValueError):
        return {}


def _difference(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """Name the first setting in which two requests differ; of lists, what only one of them has."""
    if not earlier:
        return f"its {REQUEST} is missing or damaged"
    key = next(key for key in [*now, *earlier] if earlier.get(key) != now.get(key))
    old, new = earlier.get(key), now.get(key)
    if isinstance(old, list) and isinstance(new, list) and set(map(str, old)) != set(map(str, new)):
        old, new = [x for x in old if x not in new], [x for x in new if x not in old]
    return f"{key}: {_said(old)} there, {_said(new)} now"


def _said(value: Any) -> str:
    return (", ".join(map(str, value)) or "nothing more") if isinstance(value, list) else str(value)


def _fresh(target: Path) -> Path:
    return target.with_name(f".{target.name}.new")


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _exchange(a: Path, b: Path) -> bool:
    """Exchange the names of two folders in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library from before 2018
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of the kernel's headers
    if rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):  # not on this file system
        return False
    raise OSError(code, os.strerror(code), str(b))


def _sync(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
