"""Write beside, then rename into place: a reader, or a process killed midway, never meets half a file."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lediflow.errors import UserError

_UNFINISHED = re.compile(r"\..+-[0-9a-f]{32}(\.\w+)?")  # the names that `written_whole` makes up


@contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn the system's refusal to write into a UserError that names `target`."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's error in its own
        raise UserError(
            f"cannot write {target}: {error}; free some space or choose another --output"
        ) from None


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
    """Let `fill(folder)` write a folder beside `target`, then move it to `target`, replacing what is there.

    Raises:
        UserError: the disk is full or the folder cannot be written; `target` is as it was.
    """
    fresh, old = (target.with_name(f".{target.name}.{tag}") for tag in ("new", "old"))
    with explained(target):
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            fill(fresh)
            for path in (*fresh.rglob("*"), fresh):
                _sync(path)
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
                target.rename(old)
            fresh.rename(target)
            _sync(target.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(target: Path) -> None:
    """Remove a folder under another name, so that what a killed process leaves is not taken for it."""
    gone = target.with_name(f".{target.name}.gone")
    target.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Remove what killed processes left in `folder`, and bring back what they were about to replace."""
    for path in folder.glob(".*"):
        if path.suffix == ".old" and not (whole := path.with_name(path.stem[1:])).exists():
            path.rename(whole)
        elif path.suffix in (".new", ".old", ".gone"):
            shutil.rmtree(path, ignore_errors=True)
        elif _UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
