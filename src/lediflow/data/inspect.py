"""What a DATASET holds: every picture decoded once, counted, and the broken ones named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from lediflow.data.batches import loaded
from lediflow.data.decode import BrokenImageError, decode, describe_picture
from lediflow.data.listing import open_with_home
from lediflow.data.opening import Home, picture_name
from lediflow.errors import UserError
from lediflow.files import quoted, shown

_ROWS = 64  # looked at together
_SHEET = (8, 8)  # columns and rows of the contact sheet
_THUMB = 96  # pixels


@dataclass
class Report:
    """What was found. Counts are of pictures.

    Attributes:
        dataset: as it was given; names are fit to be printed, here and below.
        split: as it was given.
        images: all of them, broken ones too.
        bytes: of the readable ones, as stored.
        classes: readable pictures by class, in the order of the classes; empty without classes.
        formats: readable pictures by file format.
        modes: readable pictures by PIL's mode: RGB, L, P, CMYK, I;16, ...
        sizes: readable pictures by "width x height", the most frequent first.
        short_side: smallest, median and largest of the shorter sides, pixels.
        broken: name and reason of each broken picture.
    """

    dataset: str
    split: str
    images: int
    bytes: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    short_side: tuple[int, int, int] = (0, 0, 0)
    broken: list[tuple[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def to_text(self) -> str:
        """Return what a person reads, ending in a new line."""
        good = self.images - len(self.broken)
        lines = [f"{good:,} readable of {self.images:,} images in {self.dataset} ({self.split})"]
        if good:
            low, middle, high = self.short_side
            lines.append(f"short side   {low} to {high} pixels, median {middle}")
            lines.append(f"sizes        {_counts(self.sizes, 4)}")
            lines.append(f"formats      {_counts(self.formats)}; modes {_counts(self.modes)}")
            lines.append(f"stored       {self.bytes / good / 1e3:.1f} kB each, {self.bytes / 1e6:.1f} MB")
        lines.append(f"classes      {_counts(self.classes, 12) if self.classes else 'none'}")
        lines.append(f"broken       {len(self.broken):,}")
        lines += [f"  {name}: {reason}" for name, reason in self.broken]
        return "\n".join(lines) + "\n"


def inspect_dataset(
    dataset: str,
    split: str = "train",
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Decode every picture of DATASET and report what was found.

    Args:
        dataset: as for `open_dataset`.
        split: of the dataset.
        workers: processes that decode; 0 decodes in this one.
        progress: called with the numbers of images done and to do.

    Raises:
        UserError: nothing there, no pictures in it, or no such split.
    """
    rows, home = open_with_home(dataset, split)
    parts = [range(i, min(i + _ROWS, len(rows))) for i in range(0, len(rows), _ROWS)]
    report = Report(shown(dataset), split, len(rows))
    counts = {name: Counter[str]() for name in ("format", "mode", "size")}
    sides, good = [], []
    for rows_of_part, part in zip(parts, loaded(_Look(rows, home), parts, workers), strict=True):
        progress(rows_of_part.stop, len(rows))
        for row, found in part:
            if isinstance(found, tuple):
                report.broken.append(found)
                continue
            good.append(row)
            report.bytes += found["bytes"]
            width, height = found["size"]
            sides.append(min(width, height))
            for name, value in (("format", found["format"]), ("mode", found["mode"])):
                counts[name][value] += 1
            counts["size"][f"{width}x{height}"] += 1
    if sides:
        report.short_side = (min(sides), int(np.median(sides)), max(sides))
    report.formats, report.modes, report.sizes = (dict(c.most_common()) for c in counts.values())
    report.classes = _classes(rows, good)
    return report


def contact_sheet(dataset: str, split: str = "train") -> Image.Image:
    """Return thumbnails of readable pictures taken evenly over DATASET, with their class.

    Raises:
        UserError: as `inspect_dataset`, or no picture can be read.
    """
    rows, home = open_with_home(dataset, split)
    columns, lines = _SHEET
    labelled = "label" in rows.column_names
    cell = _THUMB + (14 if labelled else 2)
    thumbs = []
    for row in np.unique(np.linspace(0, len(rows) - 1, min(len(rows), columns * lines), dtype=int)).tolist():
        try:
            pixels = decode(rows[row]["image"], image_size=_THUMB, channels=3, home=home)
        except BrokenImageError:
            continue
        thumbs.append((Image.fromarray(pixels.transpose(1, 2, 0)), _name(rows, rows[row].get("label"))))
    if not thumbs:
        raise UserError(f"none of the images looked at in {quoted(dataset)} can be read")
    height = -(-len(thumbs) // columns) * cell
    sheet = Image.new("RGB", (min(len(thumbs), columns) * (_THUMB + 2), height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (thumb, name) in enumerate(thumbs):
        left, top = i % columns * (_THUMB + 2), i // columns * cell
        sheet.paste(thumb, (left, top))
        if labelled:
            pen.text((left + 1, top + _THUMB + 1), name[:16], fill="black")
    return sheet


class _Look:
    """Decode rows and describe them; an object, so that worker processes can be handed it."""

    def __init__(self, rows: Any, home: Home) -> None:
        self.rows, self.home = rows, home

    def __call__(self, part: range) -> list[tuple[int, Any]]:
        # a row at a time: the stored bytes of many large pictures would not fit in memory
        return [(row, self._found(row, self.rows[row]["image"])) for row in part]

    def _found(self, row: int, record: Any) -> Any:
        try:
            return describe_picture(record, self.home)
        except BrokenImageError as error:
            return picture_name(record, row), str(error)


def _classes(rows: Any, good: list[int]) -> dict[str, int]:
    if "label" not in rows.column_names:
        return {}
    labels = rows["label"][:]
    found = Counter(labels[row] for row in good)
    names = getattr(rows.features["label"], "names", None)
    known = range(len(names)) if names else sorted(found, key=lambda label: (label is None, label))
    return {_name(rows, label): found[label] for label in known}


def _name(rows: Any, label: int | None) -> str:
    names = getattr(rows.features.get("label"), "names", None)
    return shown(names[label]) if names and label is not None and 0 <= label < len(names) else str(label)


def _counts(counts: dict[str, int], most: int = 6) -> str:
    shown = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:most])
    return shown + (f", and {len(counts) - most} more" if len(counts) > most else "")
