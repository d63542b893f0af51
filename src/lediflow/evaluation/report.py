"""Show what was measured: grids of images, the quality plot, tables for Markdown.

Everything that is written to a file is written beside it first and then moved into place, so a reader
(or a run that is cut off) never meets half a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lediflow.data.images import to_uint8
from lediflow.errors import UserError
from lediflow.files import written_whole

# Okabe and Ito, "Color Universal Design" (2008), which colour-blind readers can tell apart, in an order
# that puts the darkest first; the markers tell the curves apart in black and white too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "D", "^", "v", "P")
_INK, _FAINT = "#222222", "#767676"


@dataclass(frozen=True)
class Point:
    """One measurement of one model.

    Attributes:
        steps: solver steps, at least 1.
        nfe: network evaluations for one image, the prior's included.
        ms_per_image: time for one image in milliseconds, above 0.
        value: the metric, above 0; lower is better.
        low: lower end of its interval; None for none.
        high: upper end.
        solver: of the steps, where several are compared.
    """

    steps: int
    nfe: int
    ms_per_image: float
    value: float
    low: float | None = None
    high: float | None = None
    solver: str = ""


def image_grid(
    rows: Sequence[Tensor] | Tensor, *, columns: int | None = None, scale: int = 1, pad: int = 2
) -> Image.Image:
    """Lay images out in a grid on white.

    Args:
        rows: images (N, C, H, W), float in [-1, 1] with C 1 or 3; or a sequence of such tensors, each
            of which starts a new row. Values outside are clamped, those that are no number come out black.
        columns: images per row, after which a row wraps. None stands for the square root of N (rounded
            up) for one tensor and for the longest of several.
        scale: each pixel becomes ``scale`` x ``scale`` pixels, without smoothing.
        pad: pixels of white between the images and around the grid, not scaled.

    Returns:
        An RGB image, or "L" when all images are grey, of width
        ``columns * (W * scale + pad) + pad``, likewise in height.

    Raises:
        UserError: if there is no image, their sizes differ, or a number is out of range.
    """
    tensors = [rows] if isinstance(rows, Tensor) else list(rows)
    if not tensors or any(t.ndim != 4 or len(t) == 0 or t.shape[1] not in (1, 3) for t in tensors):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors) or "nothing"
        raise UserError(f"a grid needs images (N, C, H, W) with C 1 or 3 and N at least 1, not {shapes}")
    if len({tuple(t.shape[2:]) for t in tensors}) > 1:
        raise UserError("all images of a grid must have the same height and width")
    if columns is None:
        columns = ceil(sqrt(len(rows))) if isinstance(rows, Tensor) else max(len(t) for t in tensors)
    if columns < 1 or scale < 1 or pad < 0:
        raise UserError(
            f"a grid needs columns and scale of at least 1 and no negative pad, not {columns}, {scale}, {pad}"
        )
    lines = [line for tensor in tensors for line in tensor.split(columns)]
    mode = "L" if all(t.shape[1] == 1 for t in tensors) else "RGB"
    height, width = (side * scale for side in tensors[0].shape[2:])
    size = (columns * (width + pad) + pad, len(lines) * (height + pad) + pad)
    grid = Image.new(mode, size, "white")
    for row, line in enumerate(lines):
        for column, pixels in enumerate(_to_bytes(line)):
            cell = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            grid.paste(cell, (pad + column * (width + pad), pad + row * (height + pad)))
    return grid


def labelled_grid(
    rows: Mapping[str, Tensor], path: str | Path, *, scale: int = 4, title: str | None = None
) -> Path:
    """Write a grid whose rows carry their names at the left, for reading by eye.

    Args:
        rows: images (n, C, H, W), float in [-1, 1], by the row's label; a label may hold line breaks.
        path: file to write; the suffix decides the format (PNG is right for small images). Missing
            folders are made.
        scale: as for :func:`image_grid`.
        title: a line above the grid, if given.

    Returns:
        The path written.

    Raises:
        UserError: as :func:`image_grid`, or if Pillow knows no format of that suffix.
    """
    path = Path(path)
    if path.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"cannot write an image to {path}: give it a suffix such as .png")
    pad, margin = max(2, scale // 2), 12
    grid = image_grid(list(rows.values()), scale=scale, pad=pad)
    cell = (grid.height - pad) // len(rows)
    size = min(18, max(11, cell // 4))
    font, title_font = ImageFont.load_default(size=size), ImageFont.load_default(size=size + 3)

    ruler = ImageDraw.Draw(grid)
    boxes = [ruler.multiline_textbbox((0, 0), label, font=font) for label in rows]
    gutter = ceil(max(right for _, _, right, _ in boxes)) + 2 * margin
    head, title_width = margin, 0
    if title is not None:
        _, _, right, bottom = ruler.multiline_textbbox((0, 0), title, font=title_font)
        head, title_width = ceil(bottom) + 2 * margin, ceil(right) + 2 * margin

    width = max(gutter + grid.width + margin - pad, title_width)
    sheet = Image.new("RGB", (width, head + grid.height + margin - pad), "white")
    sheet.paste(grid, (gutter - pad, head - pad))
    draw = ImageDraw.Draw(sheet)
    if title is not None:
        draw.multiline_text((margin, margin), title, font=title_font, fill=_INK)
    for row, label in enumerate(rows):
        middle = head + row * cell + (cell - pad) / 2
        draw.multiline_text((margin, middle), label, font=font, fill=_INK, anchor="lm")
    with written_whole(path) as unfinished:
        sheet.save(unfinished)
    return path


def quality_plot(
    curves: Mapping[str, Sequence[Point]], path: str | Path, *, floor: float | None, metric: str
) -> Path:
    """Write two panels: the metric against steps, and the same points against the time for one image.

    The second shows the Pareto front too, as a broad grey line: the points that nothing beats in both.

    Args:
        curves: points by the model's name, at least one each; they are drawn in the order of steps.
        path: file to write, ``.png`` or ``.svg``. Missing folders are made.
        floor: what real images score, drawn as a dashed line; None for no line.
        metric: the metric's name, for the vertical axis; lower is taken as better.

    Returns:
        The path written.

    Raises:
        UserError: for another suffix, more than 6 curves, an empty one, or a time, value or floor that
            a logarithmic axis cannot show.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"the plot is written as .png or .svg, not {path.suffix or 'without a suffix'}")
    if not 1 <= len(curves) <= len(_COLOURS) or not all(curves.values()):
        raise UserError(f"a plot shows 1 to {len(_COLOURS)} curves of at least one point each")
    points = [point for curve in curves.values() for point in curve]
    shown = [x for point in points for x in (point.steps, point.ms_per_image, point.value)]
    if not all(x > 0 for x in (*shown, *([] if floor is None else [floor]))):
        raise UserError("steps, times, values and the floor must be above 0 on logarithmic axes")

    figure = Figure(figsize=(9.0, 4.1), layout="constrained")
    by_steps, by_time = figure.subplots(1, 2, sharey=True)
    for (name, curve), colour, marker in zip(curves.items(), _COLOURS, _MARKERS, strict=False):
        ordered = sorted(curve, key=lambda point: point.steps)
        values = [point.value for point in ordered]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 6, "linewidth": 2}
        by_steps.plot([point.steps for point in ordered], values, label=name, **style)
        by_time.plot([point.ms_per_image for point in ordered], values, **style)
        for point in ordered:
            if point.low is not None and point.high is not None:
                # a logarithmic axis has no place for an end at 0
                ends = [max(point.low, point.value / 20), point.high]
                by_steps.plot([point.steps] * 2, ends, color=colour, linewidth=1)
                by_time.plot([point.ms_per_image] * 2, ends, color=colour, linewidth=1)
        for point in ordered:
            by_time.annotate(
                str(point.steps),
                (point.ms_per_image, point.value),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
    front = pareto_front(points)
    by_time.plot(
        [p.ms_per_image for p in front], [p.value for p in front], color="#D0D0D0", linewidth=7, zorder=0
    )
    _log_axes(by_steps, by_time, points, floor)
    by_steps.set(xlabel="solver steps", ylabel=f"{metric} (lower is better)")
    by_time.tick_params(axis="y", length=0)
    by_time.set(xlabel="milliseconds per image (numbers: steps)")
    figure.legend(loc="outside upper left", ncols=len(curves), frameon=False)

    # A date and random ids would make each SVG of the same numbers a different file.
    fixed = {"Date": None} if path.suffix.lower() == ".svg" else None
    with written_whole(path) as unfinished, rc_context({"svg.hashsalt": "lediflow"}):
        figure.savefig(unfinished, dpi=160, metadata=fixed)
    return path


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both time and value, fastest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.ms_per_image, p.value)):
        if not front or point.value < front[-1].value:
            front.append(point)
    return front


def verdict(lediflow: Sequence[Point], baseline: Sequence[Point]) -> str:
    """Say what LeDiFlow needs to be at least as good as the best of plain flow matching.

    Where a faster point of the baseline lies within the interval of its best, that is said too: the best may
    be the best by chance, and the saving against it too large.
    """
    best = min(baseline, key=lambda point: point.value)
    equal = [point for point in lediflow if point.value <= best.value]
    if not equal:
        return (
            f"LeDiFlow does not reach the best of flow matching ({best.value:.3g} at {_steps(best)}) "
            "at any step count."
        )
    fastest = min(equal, key=lambda point: point.ms_per_image)
    return (
        f"LeDiFlow with {_steps(fastest)} ({fastest.value:.3g}) is at least as good as the best of flow "
        f"matching ({best.value:.3g} at {_steps(best)}) in {fastest.ms_per_image:.2f} instead of "
        f"{best.ms_per_image:.2f} ms per image: {best.ms_per_image / fastest.ms_per_image:.1f} times "
        "the speed." + _nearly_best(baseline, best)
    )


def _nearly_best(baseline: Sequence[Point], best: Point) -> str:
    near = [p for p in baseline if best.high is not None and p.value <= best.high]
    if not near or (soonest := min(near, key=lambda p: p.ms_per_image)) is best:
        return ""
    return (
        f" Flow matching is within the interval of its best already with {_steps(soonest)} "
        f"({soonest.value:.3g}) in {soonest.ms_per_image:.2f} ms."
    )


def _steps(point: Point) -> str:
    return " ".join(filter(None, (str(point.steps), point.solver, "steps" if point.steps > 1 else "step")))


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table whose columns are aligned in the source too.

    Args:
        headers: one name for each column.
        rows: cells, shown by ``str``, so format numbers beforehand; a ``|`` in them is escaped. A
            column that holds only numbers is set to the right.

    Returns:
        The table, without a line break at the end.

    Raises:
        ValueError: if a row has more or fewer cells than there are headers.
    """
    if any(len(row) != len(headers) for row in rows):
        raise ValueError(f"each row of this table needs {len(headers)} cells")
    table = [[str(cell).replace("|", "\\|") for cell in row] for row in (headers, *rows)]
    columns = list(zip(*table, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    numeric = [len(column) > 1 and all(map(_is_number, column[1:])) for column in columns]
    rule = [("-" * (w - 1) + ":") if right else "-" * w for w, right in zip(widths, numeric, strict=True)]
    lines = [
        [
            cell.rjust(w) if right else cell.ljust(w)
            for cell, w, right in zip(row, widths, numeric, strict=True)
        ]
        for row in table
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _log_axes(by_steps: Any, by_time: Any, points: Sequence[Point], floor: float | None) -> None:
    """Set the scales, ticks, limits and the floor's line of the two panels of the quality plot."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    def plainly(value: float, _: int) -> str:
        return f"{value:g}"

    by_steps.set_xscale("log", base=2)
    by_steps.xaxis.set_major_locator(FixedLocator(sorted({point.steps for point in points})))
    by_steps.xaxis.set_minor_locator(NullLocator())
    by_time.set_xscale("log")
    for axis in (by_time.xaxis, by_steps.yaxis):
        if axis is by_steps.yaxis:
            by_steps.set_yscale("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
    for axis in (by_steps.xaxis, by_time.xaxis, by_steps.yaxis):
        axis.set_major_formatter(FuncFormatter(plainly))

    heights = [point.value for point in points] + ([] if floor is None else [floor])
    times = [point.ms_per_image for point in points]
    by_steps.set_ylim(min(heights) / 1.35, max(heights) * 1.35)
    # Room for one tick at least, also when the points lie close together.
    by_time.set_xlim(min(times) / 1.6, max(times) * 1.6)
    for panel in (by_steps, by_time):
        panel.grid(True, color="#E4E4E4", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        if floor is not None:
            panel.axhline(floor, color=_FAINT, linestyle="--", linewidth=1.2, zorder=1)
    if floor is not None:
        by_steps.annotate(
            f"real images: {floor:.3g}",
            (0.01, floor),
            xycoords=("axes fraction", "data"),
            xytext=(2, -4),
            textcoords="offset points",
            va="top",
            fontsize=9,
            color=_FAINT,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )


def _to_bytes(images: Tensor) -> Any:
    """Return images (N, C, H, W) in [-1, 1] as uint8 arrays, (N, H, W) or (N, H, W, 3)."""
    pixels = to_uint8(torch.nan_to_num(images.detach().cpu(), nan=-1.0))
    return (pixels[:, 0] if pixels.shape[1] == 1 else pixels.permute(0, 2, 3, 1)).numpy()
