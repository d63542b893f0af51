"""An evaluation to read: tables, plots, grids by steps, closest training images; report.html holds all."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lediflow.data.images import to_float
from lediflow.evaluation.reference import RealImages
from lediflow.evaluation.report import Point, labelled_grid, markdown_table, quality_plot, verdict
from lediflow.evaluation.sampling import in_words, latent_words
from lediflow.files import write_text

NETWORKS = ("flow", "sampler", "decoder", "codec")
MOST_CURVES = 6

MEANINGS = {
    "cmmd": "CMMD: squared MMD of CLIP embeddings, times 1000. Lower is better.",
    "mmd": "The CMMD's formula in these features. Lower is better; not comparable with published CMMDs.",
    "fid": "FID: Frechet distance of Inception features. Lower is better; it depends on the count of images.",
    "frechet": "Frechet distance in these features. Lower is better; it depends on the number of images.",
    "kid": "KID: unbiased squared MMD of Inception features, cubic kernel. Lower is better; 0 is best.",
    "kernel": "The KID's formula in these features. Lower is better; 0 is best.",
    "precision": "Share of generated images inside the real set: fidelity. Higher is better.",
    "density": "How densely real images lie around generated ones; about 1 for a perfect model.",
    "recall": "Share of real images inside the generated set: diversity. Higher is better.",
    "coverage": "Share of real images with a generated one near by: diversity. Higher is better.",
    "copies": "Share of generated images closer to a training image than 99 of 100 new real images are; "
    "about 0.01 for a model that has not learnt images by heart.",
    "psnr": "Reconstruction through encoder, prior and flow: signal-to-noise ratio in dB. Higher is better.",
    "ssim": "Reconstruction: structural similarity. Higher is better.",
    "lpips": "Reconstruction: LPIPS (AlexNet). Lower is better.",
}


def write_report(
    results: Mapping[str, Any],
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
    says = verdicts(results, headline)
    markdown = [f"Data: {results['settings']['data']}. {_how(results)}", speed, quality]
    write_text(output / "table.md", "\n\n".join([*markdown, *says, *results["notes"]]) + "\n")
    plots = [path for f in results["features"] for path in _plots(results, f, output)]
    grids = _grids(results, pictures, output)
    neighbours = _neighbours(results, pictures, references, output)
    body = [
        _section("Result", *(f"<p>{html.escape(text)}</p>" for text in says or ["No baseline was given."])),
        _section("Read with care", _list(results["notes"])) if results["notes"] else "",
        _section("Quality and cost", _html_table(speed), *map(_picture, plots)),
        _section("Every metric, with 95 % intervals", _html_table(quality), _meanings(results)),
        _section("The same seeds at every number of steps", *map(_picture, grids)),
        _section(
            "Closest training images",
            "<p>The eight generated images that lie nearest to a training image, and these. A copy shows "
            "itself here.</p>",
            *map(_picture, neighbours),
        ),
        _section("How it was measured", f"<p>{html.escape(_how(results))}</p>"),
    ]
    write_text(output / "report.html", _PAGE.format(title="Evaluation", body="\n".join(body)))


def speed_table(results: Mapping[str, Any], headline: str) -> str:
    """Return the table like the paper's Table 1: evaluations and milliseconds by network, and one metric."""
    shown = [n for n in NETWORKS if any(n in row["ms_per_image"] for row in results["rows"])]
    headers = [*_names(results), "evaluations", "ms / image", *(f"{n} ms" for n in shown)]
    rows = []
    for row in results["rows"]:
        ms = row["ms_per_image"]
        evaluations = " + ".join(f"{count} {name}" for name, count in row["nfe"].items())
        rows.append(
            [*_named(row, results), evaluations, f"{ms['total']:.2f}"]
            + [f"{ms[name]:.2f}" if name in ms else "" for name in shown]
            + [f"{ms['other']:.2f}", f"{row['images_per_second']:.1f}", interval(row["metrics"][headline])]
        )
    return markdown_table([*headers, "other ms", "images / s", headline], rows)


def quality_table(results: Mapping[str, Any]) -> str:
    """Return the table of all metrics with their intervals; the last rows are the floors."""
    names = list(dict.fromkeys(name for row in results["rows"] for name in row["metrics"]))
    rows = [
        _named(row, results)
        + [interval(row["metrics"][name]) if name in row["metrics"] else "" for name in names]
        for row in results["rows"]
    ]
    for real in results["real"]:
        if real["floor"]:
            cells = [interval(real["floor"][name]) if name in real["floor"] else "" for name in names]
            who = [f"{real['floor_images']} real images, {real['shape'][1]} px"]
            rows.append([*who, *[""] * (len(_names(results)) - 1), *cells])
    return markdown_table([*_names(results), *names], rows)


def _names(results: Mapping[str, Any]) -> list[str]:
    """Headers of what tells rows apart; the latent sampler has a column where a model has one."""
    latent = any(latent_words(row) for row in results["rows"])
    return ["model", "solver", "steps", *(["latent sampler"] if latent else [])]


def _named(row: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    """The cells below `_names`."""
    return [row["model"], row["solver"], str(row["steps"]), latent_words(row)][: len(_names(results))]


def interval(estimate: Mapping[str, float]) -> str:
    """Return a value with its interval as text."""
    value, low, high = (f"{estimate[key]:.3g}" for key in ("value", "low", "high"))
    return value if low == high else f"{value} [{low}, {high}]"


def verdicts(results: Mapping[str, Any], headline: str) -> list[str]:
    """Compare each LeDiFlow model with the plain flow matching models at the same size of image."""
    shapes = {model["name"]: tuple(model["shape"]) for model in results["models"]}
    kinds = {row["model"]: row["kind"] for row in results["rows"]}
    points = {
        name: [_point(row, headline) for row in results["rows"] if row["model"] == name] for name in kinds
    }
    says = []
    for name, kind in kinds.items():
        rivals = [n for n, k in kinds.items() if k == "FlowMatchingPipeline" and shapes[n] == shapes[name]]
        if kind == "LeDiFlowPipeline" and rivals:
            baseline = [point for rival in rivals for point in points[rival]]
            says.append(f"{name}, by {headline}: {verdict(points[name], baseline)}")
    return says


def _point(row: Mapping[str, Any], metric: str) -> Point:
    found = row["metrics"][metric]
    return Point(
        row["steps"],
        sum(row["nfe"].values()),
        row["ms_per_image"]["total"],
        found["value"],
        found["low"],
        found["high"],
        row["solver"],
    )


def _plots(results: Mapping[str, Any], features: Mapping[str, str], output: Path) -> list[Path]:
    """Write a plot for each metric of these features that a logarithmic axis can show."""
    several = len({row["solver"] for row in results["rows"]}) > 1
    written = []
    metrics = dict.fromkeys([features["headline"], *_distances(results, features["name"])])
    for metric in metrics:
        curves: dict[str, list[Point]] = {}
        for row in results["rows"]:
            name = f"{row['model']}, {row['solver']}" if several else row["model"]
            curves.setdefault(name, []).append(_point(row, metric))
        if any(point.value <= 0 for curve in curves.values() for point in curve):
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


def _distances(results: Mapping[str, Any], network: str) -> list[str]:
    known = {f"{network}/{name}" for name in ("cmmd", "mmd", "fid", "frechet", "kid", "kernel")}
    return [name for name in results["rows"][0]["metrics"] if name in known]


def _grids(results: Mapping[str, Any], pictures: Sequence[Mapping[str, Tensor]], output: Path) -> list[Path]:
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
    results: Mapping[str, Any],
    pictures: Sequence[Mapping[str, Tensor]],
    references: Mapping[tuple[int, int, int], RealImages],
    output: Path,
) -> list[Path]:
    """Write, for each model's row of most steps, its images that lie closest to a training image."""
    shapes = {model["name"]: tuple(model["shape"]) for model in results["models"]}
    last: dict[str, tuple[Mapping[str, Any], Mapping[str, Tensor]]] = {}
    for row, shown in zip(results["rows"], pictures, strict=True):
        if row["model"] not in last or row["steps"] >= last[row["model"]][0]["steps"]:
            last[row["model"]] = row, shown
    written = []
    for name, (row, shown) in last.items():
        reference = references[shapes[name]]
        training = torch.cat(
            [
                reference.pixels(range(found["training_image"], found["training_image"] + 1))
                for found in row["closest"]
            ]
        )
        grid = {"generated": to_float(shown["closest"]), "closest\ntraining image": to_float(training)}
        path = output / f"closest-{_file_name(name)}.png"
        title = f"{name}, {in_words(row['solver'], row['steps'])}"
        written.append(labelled_grid(grid, path, scale=_scale(training), title=title))
    return written


def _scale(images: Tensor) -> int:
    return max(1, 64 // images.shape[-1])


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")


def _how(results: Mapping[str, Any]) -> str:
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


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n" + "\n".join(parts) + "</section>"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _meanings(results: Mapping[str, Any]) -> str:
    names = dict.fromkeys(name.rsplit("/", 1)[1] for row in results["rows"] for name in row["metrics"])
    terms = "".join(f"<dt>{name}</dt><dd>{html.escape(MEANINGS[name])}</dd>" for name in names)
    return f"<dl>{terms}</dl>"


def _html_table(markdown: str) -> str:
    """Return a table of `markdown_table` as HTML."""
    header, _, *rows = (
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in markdown.splitlines()
    )
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem }}
body {{ margin: 2rem auto; padding: 0 1rem }}
h1, h2 {{ line-height: 1.2 }} img {{ max-width: 100%; display: block; margin: 1rem 0 }}
.wide {{ overflow-x: auto }} table {{ border-collapse: collapse; font-size: 0.85rem }}
th, td {{ text-align: left; padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; white-space: nowrap }}
dt {{ font-weight: 600; float: left; clear: left; width: 7rem }} dd {{ margin-left: 8rem }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""
