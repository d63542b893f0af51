"""Which pictures a DATASET names: a folder, table files, tar shards, a Hub id, or the embedded digits.

`datasets` lists and reads them. What is decided here is what a user's argument means. Nothing is decoded.
"""

from __future__ import annotations

import glob
import io
import os
import re
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lediflow.errors import UserError

if TYPE_CHECKING:
    import datasets

# The names a split goes by, in files and in folders; the first one found is taken.
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "test"),
}
# What reads a kind of file, by the names of datasets' own builders.
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
# A folder with a file of this name holds a codec's latents instead of pictures; see latents.py.
LATENTS_FILE = "latents.json"
_LABEL_COLUMNS = ("label", "labels", "class", "cls")


def open_dataset(
    dataset: str, split: str = "train", *, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """Find the pictures that DATASET names, without decoding any.

    Args:
        dataset: one of

            - ``digits``: scikit-learn's 1,797 handwritten digits, 32x32 grey (1,500 in ``train``, 297 in
              ``validation``); a folder of that name is written ``./digits``;
            - a folder of pictures, searched to any depth in sorted order. If every picture lies in a
              subfolder, the subfolders directly below are the classes. If there are subfolders named
              ``train`` and ``validation`` (or ``val``, ``test``), the one for ``split`` is read;
            - a ``.parquet``, ``.arrow`` or ``.tar`` (WebDataset) file, several as a glob or with a range
              (``shards/{000..009}.tar``), a folder of them, or their URLs. Among several, those with the
              split's name in theirs are read. Tar files hold ``NAME.jpg`` (or another picture, the same
              kind throughout) and optionally ``NAME.cls``, an integer;
            - a Hub dataset, ``owner/name`` or ``owner/name:config``.
        split: ``train``, ``validation`` or another name that the files use.
        streaming: read in order of storage instead of making everything addressable, which for files of
            another kind than Arrow takes a copy in datasets' cache, and for the Hub a download.

    Returns:
        A map-style dataset, or an iterable one when streaming, with a column ``image``
        (``Image(decode=False)``: bytes and path) and, where there are classes, ``label`` (ClassLabel or int).

    Raises:
        UserError: nothing there, no pictures in it, or no such split.
    """
    rows = _open(dataset, split, streaming)
    if streaming and hasattr(rows, "to_iterable_dataset"):
        return rows.to_iterable_dataset(num_shards=min(64, max(1, len(rows))))
    return rows


def _open(dataset: str, split: str, streaming: bool) -> Any:
    if dataset == "digits":
        return _open_digits(split)
    path = Path(dataset).expanduser()
    names = _expand(dataset if "://" in dataset else str(path.absolute()))
    if path.is_dir():
        return _open_folder(path.absolute(), split, streaming)
    if path.is_file():
        files = [str(path.absolute())]
    elif "://" in dataset or (len(names) > 1 and not glob.has_magic(dataset)):
        files = names
    elif glob.has_magic(dataset):
        files = [found for name in names for found in glob.glob(name, recursive=True)]
    elif _HUB_ID.fullmatch(dataset) and path.suffix not in _BUILDERS and not path.parent.is_dir():
        return _open_hub(dataset, split, streaming)
    else:
        raise UserError(
            f"no file or folder {dataset!r}; give 'digits', a folder of images, Parquet, Arrow or tar files, "
            "or a Hub dataset owner/name"
        )
    tables = sorted(file for file in files if _suffix(file) in _BUILDERS)
    if not tables:
        raise UserError(
            f"{dataset!r} is no Parquet or Arrow file and no tar; give one, or the folder of the images"
        )
    return _open_tables(_tables_for(tables, split, dataset), streaming)


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def _expand(pattern: str) -> list[str]:
    """Write out the ranges of a pattern: ``{08..11}`` is 08, 09, 10, 11."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [name for n in numbers for name in _expand(pattern[: match.start()] + n + pattern[match.end() :])]


def _suffix(file: str) -> str:
    return Path(file.partition("?")[0]).suffix.lower()


def _open_digits(split: str) -> datasets.Dataset:
    import datasets
    from sklearn.datasets import load_digits

    digits = load_digits()
    # RandomState's stream is frozen for good, so everybody's validation digits are the same ones.
    order = np.random.RandomState(0).permutation(len(digits.target))
    parts = {"train": order[:1500], "validation": order[1500:]}
    if split not in parts:
        raise UserError(f"'digits' has no split {split!r}; it has 'train' and 'validation'")

    def png(pixels: np.ndarray) -> bytes:
        # Scaled up as floats: 8x8 pixels of 17 grey levels would show steps if rounded first.
        large = Image.fromarray((pixels * (255 / 16)).astype(np.float32)).resize(
            (32, 32), Image.Resampling.BICUBIC
        )
        file = io.BytesIO()
        Image.fromarray(np.rint(np.asarray(large)).clip(0, 255).astype(np.uint8)).save(file, "PNG")
        return file.getvalue()

    rows = parts[split]
    return datasets.Dataset.from_dict(
        {
            "image": [{"bytes": png(digits.images[row]), "path": f"digit-{row:04d}.png"} for row in rows],
            "label": digits.target[rows].tolist(),
        },
        features=datasets.Features(
            {
                "image": datasets.Image(decode=False),
                "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)]),
            }
        ),
    )


def _open_folder(path: Path, split: str, streaming: bool) -> Any:
    if (path / LATENTS_FILE).is_file():
        raise UserError(f"{str(path)!r} holds a codec's latents, no images; give the images they come from")
    root = _split_folder(path, split)
    files = _visible_files(root or path)
    if not files:
        raise UserError(f"the folder {str(root or path)!r} is empty; put images in it")
    readable = {ext for ext, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    pictures = [file for file in files if file.suffix.lower() in readable]
    if not pictures:
        tables = [str(file) for file in files if file.suffix.lower() in _BUILDERS]
        if not tables:
            raise UserError(
                f"no images in {str(root or path)!r}: its {len(files)} file(s) are not images, for example "
                f"{files[0].name!r}; give a folder of PNG, JPEG, WebP or other images"
            )
        return _open_tables(tables if root else _tables_for(tables, split, str(path)), streaming)
    if root is None and split != "train":
        raise _no_split(str(path), split, "put the images in subfolders 'train' and 'validation'")
    return _pictures(root or path, pictures)


def _pictures(root: Path, pictures: list[Path]) -> datasets.Dataset:
    # Not the "imagefolder" builder: it copies its listing to a cache and asks for a layout of its own.
    import datasets

    columns: dict[str, list] = {"image": [str(picture) for picture in pictures]}
    features: dict[str, Any] = {"image": datasets.Image(decode=False)}
    parts = [picture.relative_to(root).parts for picture in pictures]
    if all(len(part) > 1 for part in parts):
        names = sorted({part[0] for part in parts})
        number = {name: i for i, name in enumerate(names)}
        columns["label"] = [number[part[0]] for part in parts]
        features["label"] = datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _split_folder(path: Path, split: str) -> Path | None:
    """Return the subfolder that holds a split, or None where the folder is not divided into splits."""
    below = {entry.name.lower(): entry for entry in sorted(path.iterdir()) if entry.is_dir()}
    visible = {name for name in below if not name.startswith(".")}
    train = visible & set(_SPLIT_NAMES["train"])
    # "train" beside "car" and "bus" is a class; alone, or beside "validation" or "test", it is a split.
    if not train or not (visible == train or visible & set(_SPLIT_NAMES["validation"])):
        return None
    for name in _SPLIT_NAMES.get(split, (split.lower(),)):
        if name in visible:
            return below[name]
    raise _no_split(str(path), split, f"make a subfolder {split!r} beside 'train'")


def _visible_files(root: Path) -> list[Path]:
    found: list[Path] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link that leads back up would be walked for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda file: file.relative_to(root).parts)


def _tables_for(tables: list[str], split: str, dataset: str) -> list[str]:
    root = os.path.commonpath([os.path.dirname(file) for file in tables])

    def named(split_name: str) -> list[str]:
        for name in _SPLIT_NAMES.get(split_name, (split_name.lower(),)):
            # Whole words only: "latest.parquet" is no test split.
            word = re.compile(rf"(?<![a-z]){re.escape(name)}(?![a-z])")
            chosen = [file for file in tables if word.search(os.path.relpath(file, root).lower())]
            if chosen:
                return chosen
        return []

    if chosen := named(split):
        return chosen
    if split != "train":
        raise _no_split(dataset, split, f"give files with {split!r} in their names, or a folder of both")
    held_out = set(named("validation"))
    # A file given by name is meant, whatever it is called.
    return [file for file in tables if file not in held_out] or tables


def _no_split(dataset: str, split: str, remedy: str) -> UserError:
    return UserError(f"{dataset!r} has no split {split!r}; {remedy}")


def _open_tables(files: list[str], streaming: bool) -> Any:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    suffix = _suffix(files[0])
    shown = repr(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    if any(_suffix(file) != suffix for file in files):
        raise UserError(f"{shown} mix Parquet, Arrow and tar files; give one kind")
    # datasets takes a path for a pattern, and names with brackets would match nothing
    sources = [file if "://" in file else glob.escape(file) for file in files]
    try:
        table = datasets.load_dataset(
            _BUILDERS[suffix], data_files=sources, split="train", streaming=streaming
        )
        return _image_and_label(table, shown)
    except UserError:
        raise
    except (DatasetGenerationError, tarfile.TarError, ValueError, OSError) as error:
        raise UserError(f"cannot read any row of {shown}: {error.__cause__ or error}") from error


def _open_hub(dataset: str, split: str, streaming: bool) -> Any:
    import datasets

    name, _, config = dataset.partition(":")
    try:
        known = datasets.get_dataset_split_names(name, config or None)
        split_name = next((s for s in _SPLIT_NAMES.get(split, (split,)) if s in known), None)
        if split_name is None:
            raise UserError(f"{dataset!r} has no split {split!r}; it has {', '.join(known)}")
        table = datasets.load_dataset(name, config or None, split=split_name, streaming=streaming)
    except UserError:
        raise
    except Exception as error:  # the Hub's client, the network and the builders each raise their own kinds
        raise UserError(
            f"no folder {dataset!r} here, and no such dataset could be read from the Hub: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return _image_and_label(table, repr(dataset))


def _image_and_label(table: Any, shown: str) -> Any:
    """Keep the column of pictures and that of classes, under their names."""
    import datasets

    if table.features is None:  # a stream whose schema is only in its rows
        table = table._resolve_features()

    def is_picture(feature: Any) -> bool:
        return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)

    pictures = [name for name, feature in table.features.items() if is_picture(feature)]
    if not pictures:
        columns = ", ".join(table.column_names)
        raise UserError(f"no image column in {shown}: its columns are {columns}; one must hold images")
    image = next((name for name in ("image", "img") if name in pictures), pictures[0])
    label = next((name for name in _LABEL_COLUMNS if _is_label(table.features.get(name))), None)
    # cast first: a stream would decode the pictures of a renamed column, and stop at a broken one
    table = table.cast_column(image, datasets.Image(decode=False))
    table = table.select_columns([image, *([label] if label else [])])
    names = {image: "image", **({label: "label"} if label else {})}
    table = table.rename_columns({old: new for old, new in names.items() if old != new})
    if label and getattr(table.features["label"], "dtype", "") in ("string", "large_string"):
        if isinstance(table, datasets.IterableDataset):
            raise UserError(
                f"the labels of {shown} are text, which cannot be numbered in a stream; "
                "set data.streaming=false"
            )
        table = table.class_encode_column("label")
    return table


def _is_label(feature: Any) -> bool:
    return re.fullmatch(r"u?int\d+|string|large_string", str(getattr(feature, "dtype", ""))) is not None
