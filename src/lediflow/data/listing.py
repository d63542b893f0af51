"""Which pictures a DATASET names: a folder, table files, tar shards, a Hub id, or the embedded digits.

`datasets` lists and reads them. What is decided here is what a user's argument means. Nothing is decoded.
"""

from __future__ import annotations

import functools
import glob
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lediflow.data.folders import (
    SPLIT_NAMES,
    joined,
    no_split,
    no_texts,
    picture_rows,
    split_folder,
    visible_files,
)
from lediflow.data.opening import NOWHERE, Home, picture_suffixes
from lediflow.errors import UserError
from lediflow.files import quoted
from lediflow.hub import dataset_commit, split_revision

if TYPE_CHECKING:
    import datasets

# What reads a kind of file, by the names of datasets' own builders.
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
# A folder with a file of this name holds a codec's latents instead of pictures; see codec_latents.py.
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
            - a Hub dataset, ``owner/name`` or ``owner/name:config``, and ``@revision`` behind it for one
              revision: a branch, a tag or a commit's hash.
        split: ``train``, ``validation`` or another name that the files use.
        streaming: read in order of storage instead of making everything addressable, which for files of
            another kind than Arrow takes a copy in datasets' cache, and for the Hub a download.

    Returns:
        A map-style dataset, or an iterable one when streaming, with a column ``image``
        (``Image(decode=False)``: bytes and path) and, where there are classes, ``label`` (ClassLabel or int).

    Raises:
        UserError: nothing there, no pictures in it, or no such split.
    """
    return open_with_home(dataset, split, streaming=streaming)[0]


def open_with_home(
    dataset: str, split: str = "train", *, streaming: bool = False, texts: Sequence[str] = ()
) -> tuple[Any, Home]:
    """Like `open_dataset`, and tell where the pictures may lie that the rows name instead of holding.

    Args:
        dataset: as for `open_dataset`.
        split: likewise.
        streaming: likewise.
        texts: names that a column of texts may have, the first of which becomes the column ``text``.

    Raises:
        UserError: as `open_dataset`; or there is no such column.
    """
    try:
        rows, home = _open(dataset, split, streaming, texts)
    except OSError as error:  # a name too long, a folder that may not be entered, a disk that fails
        raise UserError(f"cannot read {quoted(dataset)}: {error.strerror or error}") from None
    if streaming and hasattr(rows, "to_iterable_dataset"):
        rows = rows.to_iterable_dataset(num_shards=min(64, max(1, len(rows))))
    return rows, home


def _open(dataset: str, split: str, streaming: bool, texts: Sequence[str]) -> tuple[Any, Home]:
    if dataset == "digits":
        if texts:
            raise no_texts("'digits'", texts, ("image", "label"))
        return _open_digits(split), NOWHERE
    path = _local_path(dataset)
    names = _expand(dataset if "://" in dataset else str(path.absolute()))
    if path.is_dir():
        return _open_folder(path.absolute(), split, streaming, texts)
    if path.is_file():
        files = [str(path.absolute())]
    elif "://" in dataset or (len(names) > 1 and not glob.has_magic(dataset)):
        files = names
    elif glob.has_magic(dataset):
        files = [
            found
            for name in names
            for found in glob.iglob(name, recursive=True)
            if _suffix(found) in _BUILDERS
        ]
    elif _HUB_ID.fullmatch(dataset) and _suffix(dataset) not in _BUILDERS and not path.parent.is_dir():
        return _open_hub(dataset, split, streaming, texts)
    else:
        raise UserError(
            f"no file or folder {quoted(dataset)}; give 'digits', a folder of images, Parquet, Arrow or tar "
            "files, or a Hub dataset owner/name"
        )
    tables = sorted(file for file in files if _suffix(file) in _BUILDERS)
    if not tables:
        raise UserError(
            f"{quoted(dataset)} is no Parquet or Arrow file and no tar; give one, or the folder of the images"
        )
    chosen = _tables_for(tables, split, dataset)
    folders = sorted({os.path.dirname(file) for file in chosen if "://" not in file})
    return _open_tables(chosen, streaming, texts), Home(folders=tuple(folders))


def _local_path(dataset: str) -> Path:
    if not dataset.strip() or "\0" in dataset:
        raise UserError(f"{dataset!r} is no name of a file or folder")
    try:
        return Path(dataset).expanduser()
    except RuntimeError:  # no user of the name after ~
        return Path(dataset)


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w./-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_MOST_FILES = 100_000


def _expand(pattern: str) -> list[str]:
    """Write out the ranges of a pattern: ``{08..11}`` is 08, 09, 10, 11."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    if int(last) - int(first) >= _MOST_FILES:
        raise UserError(f"the range {match[0]} stands for more than {_MOST_FILES:,} files")
    numbers = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [name for n in numbers for name in _expand(pattern[: match.start()] + n + pattern[match.end() :])]


def _suffix(file: str) -> str:
    return Path(file.partition("?")[0]).suffix.lower()


@functools.cache  # writing the pictures takes a second
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


def _open_folder(path: Path, split: str, streaming: bool, texts: Sequence[str]) -> tuple[Any, Home]:
    if (path / LATENTS_FILE).is_file():
        raise UserError(f"{str(path)!r} holds a codec's latents, no images; give the images they come from")
    root = split_folder(path, split)
    here = quoted(str(root or path))
    files = visible_files(root or path)
    if not files:
        raise UserError(f"the folder {here} is empty; put images in it")
    endings = picture_suffixes()
    pictures = [file for file in files if file.suffix.lower() in endings]
    if not pictures:
        tables = [str(file) for file in files if file.suffix.lower() in _BUILDERS]
        if not tables:
            raise UserError(
                f"no images in {here}: its {len(files)} file(s) are not images, for example "
                f"{quoted(files[0].name)}; give a folder of PNG, JPEG, WebP or other images"
            )
        chosen = tables if root else _tables_for(tables, split, str(path))
        return _open_tables(chosen, streaming, texts), Home(folders=(str(path),))
    if root is None and split != "train":
        raise no_split(str(path), split, "put the images in subfolders 'train' and 'validation'")
    return picture_rows(root or path, pictures, texts), Home(listed=True)


def _tables_for(tables: list[str], split: str, dataset: str) -> list[str]:
    root = os.path.commonpath([os.path.dirname(file) for file in tables])

    def named(split_name: str) -> list[str]:
        for name in SPLIT_NAMES.get(split_name, (split_name.lower(),)):
            # Whole words only: "latest.parquet" is no test split.
            word = re.compile(rf"(?<![a-z]){re.escape(name)}(?![a-z])")
            chosen = [file for file in tables if word.search(os.path.relpath(file, root).lower())]
            if chosen:
                return chosen
        return []

    if chosen := named(split):
        return chosen
    if split != "train":
        raise no_split(dataset, split, f"give files with {split!r} in their names, or a folder of both")
    held_out = set(named("validation"))
    # A file given by name is meant, whatever it is called.
    return [file for file in tables if file not in held_out] or tables


def _open_tables(files: list[str], streaming: bool, texts: Sequence[str]) -> Any:
    import datasets

    suffix = _suffix(files[0])
    named = quoted(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    if any(_suffix(file) != suffix for file in files):
        raise UserError(f"{named} mix Parquet, Arrow and tar files; give one kind")
    # datasets takes a path for a pattern, and names with brackets would match nothing
    sources = [file if "://" in file else glob.escape(file) for file in files]
    try:
        table = datasets.load_dataset(
            _BUILDERS[suffix], data_files=sources, split="train", streaming=streaming
        )
        return _image_and_label(table, named, texts)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # datasets, pyarrow, tarfile, fsspec and the network each raise their own kinds
        cause = error.__cause__ or error
        raise UserError(f"cannot read any row of {named}: {str(cause) or type(cause).__name__}") from error


def _open_hub(dataset: str, split: str, streaming: bool, texts: Sequence[str]) -> tuple[Any, Home]:
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    hub_id, revision = split_revision(dataset)
    name, _, config = hub_id.partition(":")
    # of one commit throughout, also when somebody changes the data set meanwhile
    commit = dataset_commit(name, revision)
    at = commit or revision
    try:
        known = datasets.get_dataset_split_names(name, config or None, revision=at)
        split_name = next((s for s in SPLIT_NAMES.get(split, (split,)) if s in known), None)
        if split_name is None:
            raise UserError(f"{dataset!r} has no split {split!r}; it has {', '.join(known)}")
        table = datasets.load_dataset(
            name, config or None, split=split_name, streaming=streaming, revision=at
        )
    except UserError:
        raise
    except Exception as error:  # the Hub's client, the network and the builders each raise their own kinds
        raise UserError(
            f"no folder {dataset!r} here, and no such dataset could be read from the Hub: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if commit is None:  # datasets takes its newest copy then, whatever was asked for
        commit = _cached_commit(table)
        if revision and not (commit and commit.startswith(revision)):
            raise UserError(
                f"the Hub does not say what revision {revision} of {name} is, and the copy here is of "
                f"{'commit ' + commit if commit else 'an unknown one'}; try again when it answers"
            )
    # a dataset of loose files, or of an archive of them, has rows that name these where they are
    repository = Path(HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}")
    folders = (str(repository), str(datasets.config.DOWNLOADED_DATASETS_PATH))
    home = Home(folders=folders, url=f"hf://datasets/{name}@", commit=commit or "")
    return _image_and_label(table, repr(dataset), texts), home


def _cached_commit(table: Any) -> str | None:
    """Return the commit that a table in datasets' cache was made from; it is the name of a folder there."""
    files = getattr(table, "cache_files", None)
    folder = Path(files[0]["filename"]).parent.name if files else ""
    return folder if _COMMIT.fullmatch(folder) else None


def _image_and_label(table: Any, named: str, texts: Sequence[str]) -> Any:
    """Keep the column of pictures, that of classes, and where asked for that of texts, under their names."""
    import datasets

    if table.features is None:  # a stream whose schema is only in its rows
        table = table._resolve_features()

    def is_picture(feature: Any) -> bool:
        return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)

    pictures = [name for name, feature in table.features.items() if is_picture(feature)]
    if not pictures:
        columns = ", ".join(table.column_names)
        raise UserError(f"no image column in {named}: its columns are {columns}; one must hold images")
    image = next((name for name in ("image", "img") if name in pictures), pictures[0])
    label = next((name for name in _LABEL_COLUMNS if _is_label(table.features.get(name))), None)
    text = next((name for name in texts if all(_is_text(table.features.get(c)) for c in joined(name))), None)
    if texts and text is None:
        raise no_texts(named, texts, table.column_names)
    # cast first: a stream would decode the pictures of a renamed column, and stop at a broken one
    table = table.cast_column(image, datasets.Image(decode=False))
    if text and text == label:
        raise UserError(f"column {text} of {named} names the classes; text.column=label takes those names")
    if text and len(joined(text)) > 1:
        parts = [table[column][:] for column in joined(text)]
        table = table.add_column(text, [" ".join(filter(None, row)) for row in zip(*parts, strict=True)])
    names = {image: "image", **({label: "label"} if label else {}), **({text: "text"} if text else {})}
    table = table.select_columns([*names])
    table = table.rename_columns({old: new for old, new in names.items() if old != new})
    if label and getattr(table.features["label"], "dtype", "") in ("string", "large_string"):
        if isinstance(table, datasets.IterableDataset):
            raise UserError(
                f"the labels of {named} are text, which cannot be numbered in a stream; "
                "set data.streaming=false"
            )
        table = table.class_encode_column("label")
    return table


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("string", "large_string")


def _is_label(feature: Any) -> bool:
    return re.fullmatch(r"u?int\d+|string|large_string", str(getattr(feature, "dtype", ""))) is not None
