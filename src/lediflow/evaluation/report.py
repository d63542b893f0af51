"""An evaluation to read: table.md, plots, grids by steps, closest training images; report.html holds all."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import jinja2
from torch import Tensor

from lediflow.evaluation.plots import Point, labelled_grid, quality_plot
from lediflow.evaluation.real import RealImages
from lediflow.evaluation.request import strength_words
from lediflow.evaluation.tables import Results, markdown_table, point, quality_table, speed_table, verdicts
from lediflow.files import write_text
from lediflow.metrics.scores import DISTANCES, MEANINGS
from lediflow.ode import in_words
from lediflow.pictures import to_float

MOST_CURVES = 6


def write_report(
    results: Results,
    pictures: Sequence[Mapping[str, Tensor]],
    references: Mapping[tuple[int, int, int], RealImages],
    output: Path,
) -> None:
    """Write table.md, the pictures and report.html into a folder.

    Args:
        results: contents of results.json.
        pictures: for each row "first" and "closest", uint8 (n, C, S, S).
        references: training images by the shape of an image.
        output: folder.
    """
    headline = results["features"][0]["headline"]
    speed, quality = speed_table(results, headline), quality_table(results)
    says, how = verdicts(results, headline), _how(results)
    tables = [markdown_table(*table) for table in (speed, quality)]
    heading = f"Data: {results['settings']['data']}. {how}"
    write_text(output / "table.md", "\n\n".join([heading, *tables, *says, *results["notes"]]) + "\n")
    metrics = dict.fromkeys(name.rsplit("/", 1)[1] for row in results["rows"] for name in row["metrics"])
    page = _template().render(
        verdicts=says,
        notes=results["notes"],
        speed=speed,
        quality=quality,
        meanings={name: MEANINGS[name] for name in metrics},
        plots=[_picture(path) for path in _plots(results, output)],
        grids=[_picture(path) for path in _grids(results, pictures, output)],
        neighbours=[_picture(path) for path in _neighbours(results, pictures, references, output)],
        how=how,
    )
    write_text(output / "report.html", page)


def _template() -> jinja2.Template:
    source = files("lediflow.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def _how(results: Results) -> str:
    settings, real = results["settings"], results["real"]
    counts = " and ".join(f"{r['reference_images']} at {r['shape'][1]} px" for r in real)
    names = ", ".join(features["name"] for features in results["features"])
    return (
        f"{settings['num_images']} generated images in each row, seed {settings['seed']}. Real: {counts}. "
        f"Features: {names}. Intervals: 95 %, "
        f"{settings['bootstrap']} bootstrap replicates. Times: {results['device_name']} "
        f"({results['torch_threads']} threads), {settings['dtype']}, batches of {settings['batch_size']}, "
        f"torch {results['torch']}."
    )


def _plots(results: Results, output: Path) -> list[Path]:
    """Write a plot for each distance, by each feature network, that a logarithmic axis can show."""
    several = len({row["solver"] for row in results["rows"]}) > 1
    known = [
        name
        for features in results["features"]
        for name in (features["headline"], *(f"{features['name']}/{distance}" for distance in DISTANCES))
    ]
    written = []
    for metric in dict.fromkeys(name for name in known if name in results["rows"][0]["metrics"]):
        curves: dict[str, list[Point]] = {}
        for row in results["rows"]:
            name = f"{row['model']}, {row['solver']}" if several else row["model"]
            curves.setdefault(name, []).append(point(row, metric))
        if any(one.value <= 0 for curve in curves.values() for one in curve):
            continue
        floors = [real["floor"].get(metric, {}).get("value") for real in results["real"]]
        # one line stands for the floor only where one was measured, and is above 0
        floor = floors[0] if len(floors) == 1 and (floors[0] or 0) > 0 else None
        names = list(curves)
        for start in range(0, len(names), MOST_CURVES):
            part = f"-{start // MOST_CURVES + 1}" if len(names) > MOST_CURVES else ""
            path = output / f"quality-{_file_name(metric)}{part}.png"
            some = {name: curves[name] for name in names[start : start + MOST_CURVES]}
            written.append(quality_plot(some, path, floor=floor, metric=metric))
    return written


def _grids(results: Results, pictures: Sequence[Mapping[str, Tensor]], output: Path) -> list[Path]:
    """Write a grid for each model and solver: a line for each number of steps, the same seeds in all."""
    lines: dict[tuple[str, str], dict[str, Tensor]] = {}
    for row, shown in zip(results["rows"], pictures, strict=True):
        steps = (
            f"{row['steps']} step{'s' if row['steps'] > 1 else ''}\n{sum(row['nfe'].values())} evaluations"
        )
        lines.setdefault((row["model"], row["solver"]), {})[steps] = to_float(shown["first"])
    return [
        labelled_grid(
            grid,
            output / f"grid-{_file_name(model)}-{solver}.png",
            scale=_scale(next(iter(grid.values()))),
            title=f"{model}, {solver}",
        )
        for (model, solver), grid in lines.items()
    ]


def _neighbours(
    results: Results,
    pictures: Sequence[Mapping[str, Tensor]],
    references: Mapping[tuple[int, int, int], RealImages],
    output: Path,
) -> list[Path]:
    """Write, for each model's row of most steps, its images that lie closest to a training image."""
    shapes = {model["name"]: tuple(model["shape"]) for model in results["models"]}
    last: dict[str, tuple[Mapping, Mapping[str, Tensor]]] = {}
    for row, shown in zip(results["rows"], pictures, strict=True):
        if row["model"] not in last or row["steps"] >= last[row["model"]][0]["steps"]:
            last[row["model"]] = row, shown
    written = []
    for name, (row, shown) in last.items():
        training = references[shapes[name]].pixels([int(found["training_image"]) for found in row["closest"]])
        grid = {"generated": to_float(shown["closest"]), "closest\ntraining image": to_float(training)}
        path = output / f"closest-{_file_name(name)}.png"
        guided = strength_words(row)
        title = f"{name}, {in_words(row['solver'], row['steps'])}{guided and f', {guided}'}"
        written.append(labelled_grid(grid, path, scale=_scale(training), title=title))
    return written


def _scale(images: Tensor) -> int:
    return max(1, 64 // images.shape[-1])


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")


def _picture(path: Path) -> dict[str, str]:
    return {"name": path.stem, "base64": base64.b64encode(path.read_bytes()).decode()}
