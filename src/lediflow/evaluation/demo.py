"""The demo's comparison: LeDiFlow and plain flow matching of one run, in few rows, as table, plot and grid.

Quality is the Frechet distance in the features of a small classifier trained on the same images, so the
numbers compare within one run only. RUN/evaluation holds all that `lediflow evaluate` measures of these rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lediflow.devices import settle_precision
from lediflow.errors import UserError
from lediflow.evaluation.evaluate import (
    SHOWN_IMAGES,
    Evaluation,
    Model,
    evaluate_rows,
    join_launch,
    open_model,
)
from lediflow.evaluation.plots import Point, labelled_grid, quality_plot
from lediflow.evaluation.real import RealImages, classifier_features
from lediflow.evaluation.request import Request, Settings
from lediflow.evaluation.tables import markdown_table, point, verdict
from lediflow.files import default_cache, explained, write_text
from lediflow.metrics.classifier import accuracy
from lediflow.metrics.features import CLASSIFIER
from lediflow.pictures import to_float
from lediflow.training.config import Config, load_config

OURS, BASELINE, REFINED = "LeDiFlow", "flow matching", "one evaluation"  # what tables call the models
STEPS = {OURS: (1,), BASELINE: (1, 2, 4)}  # of unrefined models; a refined one has its one evaluation
METRIC = f"{CLASSIFIER}/frechet"
HEADERS = ["model", "steps", "evaluations (flow + latent + decoder)", "ms / image", "Frechet distance"]


@dataclass(frozen=True)
class Comparison:
    """What `compare_run` measured and wrote."""

    rows: list[dict[str, Any]]  # model, solver, steps, nfe, ms_per_image, frechet
    floor: float  # what real images that no model saw score
    table: str  # the rows as Markdown
    verdict: str  # one line on how much time LeDiFlow saves, or that it does not
    files: list[Path]


def first_grid(run: Path, device: str | None) -> Path:
    """Write grid.png with real images and those of the model as it can sample now; return its path."""
    model = open_model(run, join_launch(device), "fp32", name=OURS)
    real = RealImages(*_held_out(load_config(run / "config.yaml")), model.shape, SHOWN_IMAGES)
    request = _requests(model, Settings(data="", num_images=SHOWN_IMAGES))[0]
    rows = {
        "real": to_float(real.pixels(range(len(real)))),
        _label(OURS, request.steps): request.images(model.pipeline, range(SHOWN_IMAGES)).images.cpu(),
    }
    with explained(run):
        return labelled_grid(rows, run / "grid.png", scale=max(1, 48 // model.shape[-1]))


def compare_run(
    run: str | Path,
    *,
    device: str | None = None,
    cache: str | Path | None = None,
    classifier_steps: int = 250,
) -> Comparison:
    """Measure the models of a run and write table.md, quality.png, grid.png and results.json into it.

    As many images are made as there are held-out ones, so that the rows and the floor compare. The
    unrefined model has a row of 1 midpoint step (2 of the latent sampler), flow matching of 1, 2 and 4, and
    the refined model one of a single evaluation.

    Args:
        run: folder with the stages auxiliary, flow, sampler and baseline trained; refined ones have rows too.
        device: "cpu", "cuda" or "mps"; None for the best there is.
        cache: folder of features of real sets; None for `files.default_cache()`.
        classifier_steps: training steps of the classifier.

    Raises:
        UserError: a stage is missing, or the data has no classes or no held-out images.
    """
    run, where = Path(run), join_launch(device)
    cache = Path(cache) if cache else default_cache()
    config, dtype = load_config(run / "config.yaml"), settle_precision("auto", where)
    models = [open_model(folder, where, dtype, name=name) for name, folder in _models(run).items()]
    try:
        held_out = RealImages(*_held_out(config), models[0].shape, 10**9)
    except UserError as error:
        raise UserError(f"{error}; the comparison needs held-out images: set data.validation") from None
    settings = Settings(
        data=str(config.data.train),
        validation=None if config.data.validation is None else str(config.data.validation),
        features=(CLASSIFIER,),
        num_images=len(held_out),
        dtype=dtype,
        bootstrap=20,
        classifier_steps=classifier_steps,
    )
    wanted = [(model, request) for model in models for request in _requests(model, settings)]
    measured = evaluate_rows(wanted, settings, run / "evaluation", cache=cache, overwrite=True)
    # trained by now, so this only reads it
    reference = measured.sides[models[0].shape].reference
    network = classifier_features(reference, cache, where, steps=classifier_steps, seed=settings.seed)
    right = accuracy(network.classifier, held_out.pixels, held_out.labels())
    return _write(run, measured, held_out, right)


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


def _held_out(config: Config) -> tuple[str, str]:
    # a validation set of its own is a whole dataset; otherwise it is a split of the training set
    data = config.data
    return (str(data.train), "validation") if data.validation is None else (str(data.validation), "train")


def _requests(model: Model, settings: Settings) -> list[Request]:
    pipeline = model.pipeline
    refined = pipeline.flow.average_velocity
    latent: dict[str, Any] = {}
    if hasattr(pipeline, "sampler") and not pipeline.sampler.average_velocity:
        latent = {"latent_solver": "midpoint", "latent_steps": 2}
    return [
        settings.request(**pipeline.settle(solver="mean" if refined else "midpoint", steps=steps, **latent))
        for steps in ((1,) if refined else STEPS[model.name])
    ]


def _label(model: str, steps: int) -> str:
    return f"{model}\n{steps} step{'s' if steps > 1 else ''}"


def _write(run: Path, measured: Evaluation, held_out: RealImages, right: float) -> Comparison:
    results = measured.results
    floor = results["real"][0]["floor"][METRIC]["value"]
    rows = [
        {
            **{name: row[name] for name in ("model", "solver", "steps", "nfe")},
            "ms_per_image": row["ms_per_image"]["total"],
            "frechet": row["metrics"][METRIC]["value"],
        }
        for row in results["rows"]
    ]
    table = markdown_table(
        HEADERS,
        [
            [
                row["model"],
                row["steps"],
                " + ".join(str(row["nfe"].get(name, 0)) for name in ("flow", "sampler", "decoder")),
                f"{row['ms_per_image']:.2f}",
                f"{row['frechet']:.2f}",
            ]
            for row in rows
        ],
    )
    curves: dict[str, list[Point]] = {}
    for row in results["rows"]:
        curves.setdefault(row["model"], []).append(point(row, METRIC))
    ours, baseline = (
        [one for name, curve in curves.items() if name.startswith(kind) for one in curve]
        for kind in (OURS, BASELINE)
    )
    says = verdict(ours, baseline)
    facts = {
        "floor": floor,
        "classifier_accuracy": right,
        "images_per_row": results["settings"]["num_images"],
        "device": results["device"],
        "dtype": results["settings"]["dtype"],
        "torch_threads": results["torch_threads"],
        "rows": rows,
    }
    shown = {"real": to_float(held_out.pixels(range(min(SHOWN_IMAGES, len(held_out)))))}
    for row, pictures in zip(rows, measured.pictures, strict=True):
        shown[_label(row["model"], row["steps"])] = to_float(pictures["first"])
    with explained(run):
        files = [
            labelled_grid(shown, run / "grid.png", scale=max(1, 48 // shown["real"].shape[-1])),
            quality_plot(curves, run / "quality.png", floor=floor, metric="Frechet distance"),
            run / "table.md",
            run / "results.json",
        ]
        write_text(files[2], f"{table}\n\nFloor: {floor:.2f}. {says}\n")
        write_text(files[3], json.dumps(facts, indent=1))
    return Comparison(rows, floor, table, says, [*files, run / "evaluation" / "report.html"])
