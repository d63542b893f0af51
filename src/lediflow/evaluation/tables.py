"""What was measured, as tables and verdicts made from the rows of results.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lediflow.evaluation.plots import Point
from lediflow.evaluation.request import latent_words, strength_words

NETWORKS = ("flow", "sampler", "decoder", "codec")

Results = Mapping[str, Any]


class Table(NamedTuple):
    """Headers and rows of cells, all text."""

    headers: list[str]
    rows: list[list[str]]


def speed_table(results: Results, headline: str) -> Table:
    """Return the table like the paper's Table 1: evaluations and milliseconds by network, and one metric."""
    shown = [n for n in NETWORKS if any(n in row["ms_per_image"] for row in results["rows"])]
    rows = []
    for row in results["rows"]:
        ms = row["ms_per_image"]
        evaluations = " + ".join(f"{count} {name}" for name, count in row["nfe"].items())
        rows.append(
            [*_named(row, results), evaluations, f"{ms['total']:.2f}"]
            + [f"{ms[name]:.2f}" if name in ms else "" for name in shown]
            + [f"{ms['other']:.2f}", f"{row['images_per_second']:.1f}", interval(row["metrics"][headline])]
        )
    headers = [*_names(results), "evaluations", "ms / image", *(f"{n} ms" for n in shown)]
    return Table([*headers, "other ms", "images / s", headline], rows)


def quality_table(results: Results) -> Table:
    """Return the table of all metrics with their intervals; the last rows are the floors."""
    names = list(dict.fromkeys(name for row in results["rows"] for name in row["metrics"]))

    def cells(found: Mapping[str, Any]) -> list[str]:
        return [interval(found[name]) if name in found else "" for name in names]

    rows = [[*_named(row, results), *cells(row["metrics"])] for row in results["rows"]]
    for real in results["real"]:
        if real["floor"]:
            who = f"{real['floor_images']} real images, {real['shape'][1]} px"
            rows.append([who, *[""] * (len(_names(results)) - 1), *cells(real["floor"])])
    return Table([*_names(results), *names], rows)


def interval(estimate: Mapping[str, float]) -> str:
    """Return a value with its interval as text."""
    value, low, high = (f"{estimate[key]:.3g}" for key in ("value", "low", "high"))
    return value if low == high else f"{value} [{low}, {high}]"


def point(row: Mapping[str, Any], metric: str) -> Point:
    """Return a row as a point of a plot of `metric`."""
    found = row["metrics"][metric]
    ms = row["ms_per_image"]["total"]
    return Point(row["steps"], ms, found["value"], found["low"], found["high"], row["solver"])


def verdicts(results: Results, headline: str) -> list[str]:
    """Compare each LeDiFlow model with the plain flow matching models at the same size of image."""
    shapes = {model["name"]: tuple(model["shape"]) for model in results["models"]}
    kinds = {row["model"]: row["kind"] for row in results["rows"]}
    points = {
        name: [point(row, headline) for row in results["rows"] if row["model"] == name] for name in kinds
    }
    says = []
    for name, kind in kinds.items():
        rivals = [n for n, k in kinds.items() if k == "FlowMatchingPipeline" and shapes[n] == shapes[name]]
        if kind == "LeDiFlowPipeline" and rivals:
            baseline = [one for rival in rivals for one in points[rival]]
            says.append(f"{name}, by {headline}: {verdict(points[name], baseline)}")
    return says


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


def _names(results: Results) -> list[str]:
    """Headers of what tells rows apart; latent sampler and guidance have a column where a row has one."""
    return ["model", "solver", "steps", *_more(results)]


def _more(results: Results) -> dict[str, Callable[[Mapping[str, Any]], str]]:
    words = {"latent sampler": latent_words, "guidance": strength_words}
    return {name: say for name, say in words.items() if any(say(row) for row in results["rows"])}


def _named(row: Mapping[str, Any], results: Results) -> list[str]:
    """The cells below `_names`."""
    return [row["model"], row["solver"], str(row["steps"]), *(say(row) for say in _more(results).values())]
