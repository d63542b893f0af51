"""LeDiFlow beside plain flow matching from one run: quality against steps and time, as table, plot and grid.

Quality is the Frechet distance in the features of a small classifier trained on the same images, so the
numbers compare within one run only, and only on a dataset with classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lediflow.data.images import ImageData, to_float
from lediflow.evaluation.features import accuracy, extract_features, train_classifier
from lediflow.evaluation.latency import Latency, compare
from lediflow.evaluation.metrics import frechet_at_count, frechet_floor
from lediflow.evaluation.report import Point, labelled_grid, markdown_table, quality_plot, verdict
from lediflow.files import write_text
from lediflow.pipelines.base import ImagePipeline, load_pipeline
from lediflow.training.config import Config, load_config
from lediflow.training.processes import check_device

NAMES = {"": "LeDiFlow", "baseline": "flow matching"}  # folder in the run: what tables call it
GRID_IMAGES = 12
TIMED_IMAGES = 64


@dataclass(frozen=True)
class Row:
    """One model at one number of steps.

    Attributes:
        model: its name.
        solver: of the flow.
        steps: of the flow.
        nfe: evaluations of each network for one image.
        ms_per_image: milliseconds for one image in a batch of 64, all networks included.
        frechet: Frechet distance to the training images; lower is better.
    """

    model: str
    solver: str
    steps: int
    nfe: dict[str, int]
    ms_per_image: float
    frechet: float


@dataclass(frozen=True)
class Comparison:
    """What `compare_run` measured and wrote.

    Attributes:
        rows: the measurements.
        floor: what real images that no model saw score.
        table: the rows as Markdown.
        verdict: one line on how much time LeDiFlow saves, or that it does not.
        files: what was written.
    """

    rows: list[Row]
    floor: float
    table: str
    verdict: str
    files: list[Path]


def compare_run(
    run: str | Path,
    *,
    steps: Sequence[int] = (1, 2, 4, 8),
    solver: str = "midpoint",
    latent_steps: int = 2,
    groups: int = 3,
    device: str | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    classifier_steps: int = 400,
    seed: int = 0,
) -> Comparison:
    """Measure both models of a run and write table.md, quality.png, grid.png and results.json into it.

    Args:
        run: folder with all four stages trained.
        steps: flow steps to measure.
        solver: of the flow and the latent sampler.
        latent_steps: steps of the latent sampler.
        groups: generated images, in multiples of the number of held-out images.
        device: "cpu", "cuda" or "mps"; None for the best there is.
        dtype: autocast of all models; None for fp32.
        classifier_steps: training steps of the classifier, batches of 64.
        seed: of the classifier and of the images.

    Raises:
        UserError: a stage is missing, or the data has no classes or no held-out images.
    """
    run = Path(run)
    config = load_config(run / "config.yaml")
    where = check_device(device)
    models = {name: load_pipeline(run / folder).to(where) for folder, name in NAMES.items()}
    for model in models.values():
        model.set_progress_bar_config(disable=True)

    train, held_out = _images(config, "train"), _images(config, "validation")
    classifier = train_classifier(
        train.images,
        train.labels,
        num_classes=train.num_classes,
        seed=seed,
        steps=classifier_steps,
        flip=config.data.flip,
    )
    reference, real = (extract_features(classifier, d.images) for d in (train, held_out))
    count = len(held_out)
    floor = frechet_floor(reference, real, seed=seed)

    def options(model: str, n: int) -> dict[str, Any]:
        extra = {"latent_steps": latent_steps} if model == NAMES[""] else {}
        return {"steps": n, "solver": solver, "dtype": dtype, "output_type": "pt", "seed": seed, **extra}

    latencies = _latencies(models, steps, options, where)
    rows, shown = [], {"real": _real(held_out)}
    for model, pipeline in models.items():
        for n in steps:
            out = pipeline(groups * count, batch_size=TIMED_IMAGES, **options(model, n))
            features = extract_features(classifier, out.images.cpu())
            distance = frechet_at_count(features, reference, count=count, seed=seed)
            latency = latencies[f"{model}/{n}"]
            rows.append(Row(model, solver, n, out.nfe, latency.ms_per_image, distance))
            shown[f"{model}\n{n} step{'s' if n > 1 else ''}"] = out.images[:GRID_IMAGES].cpu()
    says = verdict(_points(rows, NAMES[""]), _points(rows, NAMES["baseline"]))
    table = _table(rows)
    facts = {
        "floor": floor,
        "classifier_accuracy": accuracy(classifier, held_out.images, held_out.labels),
        "images_per_row": groups * count,
        "group": count,
        "device": str(where),
        "dtype": str(dtype),
        "torch_threads": torch.get_num_threads(),
        "rows": [asdict(row) for row in rows],
    }
    return Comparison(rows, floor, table, says, _write(run, rows, floor, table, says, facts, shown))


def _images(config: Config, split: str) -> ImageData:
    data = config.data
    # a validation set of its own is a whole dataset; otherwise it is a split of the training set
    own = split == "validation" and data.validation is not None
    return ImageData(
        str(data.validation if own else data.train),
        split="train" if own else split,
        image_size=data.image_size,
        channels=data.channels,
        cache_gb=float("inf"),
    )


def _real(data: ImageData) -> Tensor:
    return to_float(data.images[:GRID_IMAGES])


def _latencies(models: dict[str, ImagePipeline], steps: Sequence[int], options, device) -> dict[str, Latency]:
    calls = {
        f"{model}/{n}": lambda pipeline=pipeline, model=model, n=n: pipeline(
            TIMED_IMAGES, batch_size=TIMED_IMAGES, **options(model, n)
        )
        for model, pipeline in models.items()
        for n in steps
    }
    return compare(calls, images=TIMED_IMAGES, repeats=3, device=device)


def _table(rows: list[Row]) -> str:
    return markdown_table(
        ["model", "steps", "evaluations (flow + latent + decoder)", "ms / image", "Frechet distance"],
        [
            [
                row.model,
                row.steps,
                " + ".join(str(row.nfe.get(name, 0)) for name in ("flow", "sampler", "decoder")),
                f"{row.ms_per_image:.2f}",
                f"{row.frechet:.2f}",
            ]
            for row in rows
        ],
    )


def _points(rows: list[Row], model: str) -> list[Point]:
    return [
        Point(row.steps, sum(row.nfe.values()), row.ms_per_image, row.frechet)
        for row in rows
        if row.model == model
    ]


def _write(
    run: Path,
    rows: list[Row],
    floor: float,
    table: str,
    says: str,
    facts: dict[str, Any],
    shown: dict[str, Tensor],
) -> list[Path]:
    curves = {name: _points(rows, name) for name in NAMES.values()}
    scale = max(1, 48 // shown["real"].shape[-1])
    files = [
        labelled_grid(shown, run / "grid.png", scale=scale),
        quality_plot(curves, run / "quality.png", floor=floor, metric="Frechet distance"),
        run / "table.md",
        run / "results.json",
    ]
    write_text(files[2], f"{table}\n\nFloor: {floor:.2f}. {says}\n")
    write_text(files[3], json.dumps(facts, indent=1))
    return files
