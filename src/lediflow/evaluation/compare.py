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
from lediflow.precision import DTYPES, settle_precision
from lediflow.training.config import Config, load_config
from lediflow.training.processes import check_device

OURS, BASELINE, REFINED = "LeDiFlow", "flow matching", "one evaluation"  # what tables call the models
SOLVER = "midpoint"  # for models without an average velocity
SEED = 0  # of the classifier, of the images and of the subsets that a distance is the mean over
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


class Judge:
    """The quality of images beside those of one dataset: a classifier trained on it, and its features.

    Args:
        config: of a run; its `data` has classes and held-out images.
        classifier_steps: training steps of the classifier, batches of 64.

    Attributes:
        train: the training images.
        held_out: those that no model saw.
        floor: what the held-out images score.

    Raises:
        UserError: the data has no classes or no held-out images.
    """

    def __init__(self, config: Config, *, classifier_steps: int = 400):
        self.train, self.held_out = _images(config, "train"), _images(config, "validation")
        self.classifier = train_classifier(
            self.train.images,
            self.train.labels,
            num_classes=self.train.num_classes,
            seed=SEED,
            steps=classifier_steps,
            flip=config.data.flip,
        )
        self.reference, real = (
            extract_features(self.classifier, data.images) for data in (self.train, self.held_out)
        )
        self.count = len(self.held_out)
        self.floor = frechet_floor(self.reference, real, seed=SEED)

    def frechet(self, images: Tensor) -> float:
        """Return the Frechet distance of images (N, C, H, W) in [-1, 1], at the held-out images' count."""
        features = extract_features(self.classifier, images.cpu())
        return frechet_at_count(features, self.reference, count=self.count, seed=SEED)

    def accuracy(self) -> float:
        """Return the share of held-out images that the classifier names rightly."""
        return accuracy(self.classifier, self.held_out.images, self.held_out.labels)


def compare_run(
    run: str | Path, *, steps: Sequence[int] = (1, 2, 4, 8), groups: int = 3, device: str | None = None
) -> Comparison:
    """Measure the models of a run and write table.md, quality.png, grid.png and results.json into it.

    Args:
        run: folder with the stages auxiliary, flow, sampler and baseline trained; refined ones have rows too.
        steps: flow steps to measure, of "midpoint", or of "mean" where the model has an average velocity; a
            latent sampler takes two midpoint steps or one of "mean".
        groups: generated images, in multiples of the number of held-out images.
        device: "cpu", "cuda" or "mps"; None for the best there is.

    Raises:
        UserError: a stage is missing, or the data has no classes or no held-out images.
    """
    run = Path(run)
    where = check_device(device)
    settled = settle_precision("auto", where)
    models = {name: load_pipeline(folder).to(where) for name, folder in _models(run).items()}
    for model in models.values():
        model.set_progress_bar_config(disable=True)
    judge = Judge(load_config(run / "config.yaml"))

    def options(model: str, n: int) -> dict[str, Any]:
        pipeline = models[model]
        chosen = {"steps": n, "dtype": DTYPES[settled], "output_type": "pt", "seed": SEED}
        if not pipeline.flow.average_velocity:
            chosen["solver"] = SOLVER
        if hasattr(pipeline, "sampler") and not pipeline.sampler.average_velocity:
            chosen |= {"latent_steps": 2, "latent_solver": SOLVER}
        return chosen

    wanted = [(model, n) for model in models for n in steps]
    latencies = _latencies(models, wanted, options, where)
    rows, shown = [], {"real": _real(judge.held_out)}
    for model, n in wanted:
        out = models[model](groups * judge.count, batch_size=TIMED_IMAGES, **options(model, n))
        used = options(model, n).get("solver", "mean")
        latency = latencies[f"{model}/{n}"]
        rows.append(Row(model, used, n, out.nfe, latency.ms_per_image, judge.frechet(out.images)))
        shown[f"{model}\n{n} step{'s' if n > 1 else ''}"] = out.images[:GRID_IMAGES].cpu()
    says = verdict(*(_points(rows, *(m for m in models if m.startswith(name))) for name in (OURS, BASELINE)))
    table = _table(rows)
    facts = {
        "floor": judge.floor,
        "classifier_accuracy": judge.accuracy(),
        "images_per_row": groups * judge.count,
        "group": judge.count,
        "device": str(where),
        "dtype": settled,
        "torch_threads": torch.get_num_threads(),
        "rows": [asdict(row) for row in rows],
    }
    return Comparison(
        rows, judge.floor, table, says, _write(run, rows, judge.floor, table, says, facts, shown)
    )


def _models(run: Path) -> dict[str, Path]:
    """The pipelines of a run by the name that tables give them."""
    refined = (run / "flow" / "pipeline").is_dir()
    models = {OURS: run / "flow" if refined else run}
    if refined:
        models[f"{OURS}, {REFINED}"] = run
    models[BASELINE] = run / "baseline"
    if (run / "baseline-meanflow" / "pipeline").is_dir():
        models[f"{BASELINE}, {REFINED}"] = run / "baseline-meanflow"
    return models


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


def _latencies(
    models: dict[str, ImagePipeline], wanted: list[tuple[str, int]], options, device
) -> dict[str, Latency]:
    calls = {
        f"{model}/{n}": lambda model=model, n=n: models[model](
            TIMED_IMAGES, batch_size=TIMED_IMAGES, **options(model, n)
        )
        for model, n in wanted
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


def _points(rows: list[Row], *models: str) -> list[Point]:
    return [
        Point(row.steps, sum(row.nfe.values()), row.ms_per_image, row.frechet)
        for row in rows
        if row.model in models
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
    curves = {name: _points(rows, name) for name in dict.fromkeys(row.model for row in rows)}
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
