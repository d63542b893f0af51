"""A folder of pictures: walked, divided into splits, its subfolders taken for classes."""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lediflow.data.opening import row_path
from lediflow.errors import UserError
from lediflow.files import quoted, shown

if TYPE_CHECKING:
    import datasets

# The names a split goes by, in files and in folders; the first one found is taken.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "test"),
}

METADATA = ("metadata.jsonl", "metadata.csv")  # what a folder may say of its pictures


def no_split(dataset: str, split: str, remedy: str) -> UserError:
    """Return the error that says that a split is missing, and what to do."""
    return UserError(f"{quoted(dataset)} has no split {split!r}; {remedy}")


def joined(column: str) -> list[str]:
    """Return the columns of a name as in ``text+style``, whose texts are joined by a space."""
    return column.split("+")


def no_texts(named: str, texts: Sequence[str], columns: Sequence[str]) -> UserError:
    """Return the error that says that a data set has no column of texts."""
    return UserError(
        f"no column {' or '.join(texts)} of texts in {named}: its columns are {', '.join(columns)}; name the "
        "one that holds them with text.column (label takes the names of the classes)"
    )


def split_folder(path: Path, split: str) -> Path | None:
    """Return the subfolder that holds a split, or None where the folder is not divided into splits.

    Raises:
        UserError: the folder cannot be looked into, or is divided and has no such split.
    """
    try:
        below = {entry.name.lower(): entry for entry in sorted(path.iterdir()) if entry.is_dir()}
    except OSError as error:
        raise UserError(f"cannot look into {shown(path)}: {error.strerror or error}") from None
    visible = {name for name in below if not name.startswith(".")}
    train = visible & set(SPLIT_NAMES["train"])
    # "train" beside "car" and "bus" is a class; alone, or beside "validation" or "test", it is a split.
    if not train or not (visible == train or visible & set(SPLIT_NAMES["validation"])):
        return None
    for name in SPLIT_NAMES.get(split, (split.lower(),)):
        if name in visible:
            return below[name]
    raise no_split(str(path), split, f"make a subfolder {split!r} beside 'train'")


def visible_files(root: Path) -> list[Path]:
    """Return the files below a folder in sorted order, those of linked folders too, but no hidden ones.

    A link to a folder that lies below `root` anyway is not followed, nor one that leads above it: to the file
    system's root, say. What cannot be looked into is named in a warning.
    """
    found: list[Path] = []
    seen: set[str] = set()
    top = os.path.realpath(root)
    for here, folders, names in os.walk(root, followlinks=True, onerror=_warn_of_closed):
        real = os.path.realpath(here)
        if real in seen:  # two links, or links in a linked folder, to the same one
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and _is_to_be_walked(os.path.join(here, name), top)
        )
        found += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda file: file.relative_to(root).parts)


def picture_rows(root: Path, pictures: list[Path], texts: Sequence[str] = ()) -> datasets.Dataset:
    """Return a dataset of paths; if all pictures lie in subfolders, those below `root` are the classes.

    Args:
        root: folder.
        pictures: files below it.
        texts: names that the column of texts in the folder's metadata file may have; empty for no texts.

    Raises:
        UserError: there is no such column, or the file cannot be read.
    """
    # Not the "imagefolder" builder: it copies its listing to a cache and asks for a layout of its own.
    import datasets

    columns: dict[str, list] = {"image": [row_path(picture) for picture in pictures]}
    features: dict[str, Any] = {"image": datasets.Image(decode=False)}
    parts = [picture.relative_to(root).parts for picture in pictures]
    if all(len(part) > 1 for part in parts):
        names = sorted({shown(part[0]) for part in parts})
        number = {name: i for i, name in enumerate(names)}
        columns["label"] = [number[shown(part[0])] for part in parts]
        features["label"] = datasets.ClassLabel(names=names)
    if texts:
        told = _told_texts(root, texts)
        columns["text"] = [told.get("/".join(part), "") for part in parts]
        features["text"] = datasets.Value("string")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _told_texts(root: Path, texts: Sequence[str]) -> dict[str, str]:
    """Read what the pictures show from metadata.jsonl or .csv, the layout of datasets' imagefolder."""
    file = next((path for name in METADATA if (path := root / name).is_file()), None)
    if file is None:
        raise UserError(
            f"no texts in {quoted(str(root))}: give it a {METADATA[0]} with a line "
            f'{{"file_name": ..., "{texts[0]}": ...}} for each image, or set text.column=label'
        )
    try:
        content = file.read_text(encoding="utf-8-sig")
        rows = (
            [json.loads(line) for line in content.splitlines() if line.strip()]
            if file.suffix == ".jsonl"
            else list(csv.DictReader(content.splitlines()))
        )
        columns = list(dict.fromkeys(key for row in rows for key in row))
        column = next((name for name in texts if set(joined(name)) <= set(columns)), None)
        if column is None or "file_name" not in columns:
            raise no_texts(quoted(str(file)), texts if column is None else ("file_name",), columns)
        return {
            str(row["file_name"]): " ".join(str(row[c]) for c in joined(column) if row.get(c))
            for row in rows
            if row.get("file_name")
        }
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"cannot read {quoted(str(file))}: {str(error).splitlines()[0]}") from None


def _is_to_be_walked(folder: str, top: str) -> bool:
    if not os.path.islink(folder):
        return True
    real = os.path.realpath(folder)
    if Path(top).is_relative_to(real) and real != top:
        warnings.warn(
            f"the link {shown(folder)} leads to {shown(real)}, above the folder of images: not followed",
            stacklevel=5,
        )
        return False
    return not Path(real).is_relative_to(top)


def _warn_of_closed(error: OSError) -> None:
    warnings.warn(f"cannot look into {shown(error.filename)}: {error.strerror}; it is left out", stacklevel=5)
