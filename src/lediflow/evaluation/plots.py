"""Pictures of what was measured: grids of images with labels, and quality against steps and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lediflow.errors import UserError
from lediflow.files import written_whole
from lediflow.pictures import image_grid

# Okabe and Ito, "Color Universal Design" (2008), which colour-blind readers can tell apart, in an order
# that puts the darkest first; the markers tell the curves apart in black and white too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "D", "^", "v", "P")
_INK, _FAINT = "#222222", "#767676"


@dataclass(frozen=True)
class Point:
    """One measurement of one model."""

    steps: int
    ms_per_image: float
    value: float  # of the metric; lower is better
    low: float | None = None  # of its interval
    high: float | None = None
    solver: str = ""  # where several are compared


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
        path: PNG file to write. Missing folders are made.
        floor: what real images score, drawn as a dashed line; None for no line.
        metric: the metric's name, for the vertical axis; lower is taken as better.

    Returns:
        The path written.

    Raises:
        UserError: more than 6 curves, an empty one, or a time, value or floor that a logarithmic axis cannot
            show.
    """
    from matplotlib.figure import Figure

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
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 6, "linewidth": 2}
        for panel, across in ((by_steps, "steps"), (by_time, "ms_per_image")):
            xs = [getattr(point, across) for point in ordered]
            panel.plot(xs, [point.value for point in ordered], label=name, **style)
            for x, point in zip(xs, ordered, strict=True):
                if point.low is not None and point.high is not None:
                    # a logarithmic axis has no place for an end at 0
                    ends = [max(point.low, point.value / 20), point.high]
                    panel.plot([x, x], ends, color=colour, linewidth=1)
        for point in ordered:
            at = (point.ms_per_image, point.value)
            by_time.annotate(
                str(point.steps), at, xytext=(5, 5), textcoords="offset points", fontsize=8, color=colour
            )
    front = pareto_front(points)
    times, values = [p.ms_per_image for p in front], [p.value for p in front]
    by_time.plot(times, values, color="#D0D0D0", linewidth=7, zorder=0)
    _log_axes(by_steps, by_time, points, floor)
    by_steps.set(xlabel="solver steps", ylabel=f"{metric} (lower is better)")
    by_time.tick_params(axis="y", length=0)
    by_time.set(xlabel="milliseconds per image (numbers: steps)")
    names = by_steps.get_legend_handles_labels()
    figure.legend(*names, loc="outside upper left", ncols=len(curves), frameon=False)
    with written_whole(Path(path)) as unfinished:
        figure.savefig(unfinished, dpi=160)
    return Path(path)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both time and value, fastest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.ms_per_image, p.value)):
        if not front or point.value < front[-1].value:
            front.append(point)
    return front


def _log_axes(by_steps: Any, by_time: Any, points: Sequence[Point], floor: float | None) -> None:
    """Set the scales, ticks, limits and the floor's line of the two panels of the quality plot."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    by_steps.set_xscale("log", base=2)
    by_steps.set_yscale("log")
    by_time.set_xscale("log")
    by_steps.xaxis.set_major_locator(FixedLocator(sorted({point.steps for point in points})))
    for axis in (by_time.xaxis, by_steps.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (by_steps.xaxis, by_time.xaxis, by_steps.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    heights = [point.value for point in points] + ([] if floor is None else [floor])
    times = [point.ms_per_image for point in points]
    by_steps.set_ylim(min(heights) / 1.35, max(heights) * 1.35)
    by_time.set_xlim(min(times) / 1.6, max(times) * 1.6)  # room for one tick at least
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
