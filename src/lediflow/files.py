"""Write beside, then rename into place: a reader, or a process killed midway, never meets half a file."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lediflow.errors import UserError


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


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill(folder)` write a folder beside `target`, then move it to `target`, replacing what is there.

    Raises:
        UserError: the disk is full or the folder cannot be written; `target` is as it was.
    """
    fresh, old = (target.with_name(f".{target.name}.{tag}") for tag in ("new", "old"))
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        fill(fresh)
        for path in fresh.rglob("*"):
            if path.is_file():
                _sync(path)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        fresh.rename(target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's error in its own
        shutil.rmtree(fresh, ignore_errors=True)
        raise UserError(
            f"cannot write {target}: {error}; free some space or choose another --output"
        ) from None
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
