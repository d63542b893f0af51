"""Measure models side by side: every model, solver and number of steps is a row, kept as soon as it is done.

What an evaluation keeps, and where, is in kept.py.
The processes of a launch share the making of images. The first one measures, keeps and writes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from lediflow import __version__
from lediflow.codecs import local_name
from lediflow.devices import check_device
from lediflow.errors import UserError
from lediflow.evaluation.kept import claim, read_row, write_row
from lediflow.evaluation.measure import generated_features, in_pixels, notes_of, reconstruction, timings
from lediflow.evaluation.real import RealSide, count_notes, named, open_real_side
from lediflow.evaluation.report import write_report
from lediflow.evaluation.request import Request, Settings, latent_words, strength_words
from lediflow.files import default_cache, explained, write_text
from lediflow.fingerprints import weights_digest
from lediflow.metrics.pairs import Lpips
from lediflow.metrics.scores import copies, distances
from lediflow.ode import in_words
from lediflow.pictures import to_uint8
from lediflow.pipelines.base import ImagePipeline
from lediflow.pipelines.lediflow import LeDiFlowPipeline
from lediflow.pipelines.load import load_pipeline
from lediflow.training.stages import STAGES

FORMAT = 1  # of a row: raise it when a metric changes its meaning
SHOWN_IMAGES = 12
RECONSTRUCTIONS = 256
BUSY = 0.25  # scatter of times above which small differences mean nothing
PATIENCE = timedelta(hours=24)  # for the first process, which may measure for hours between two collectives


@dataclass
class Model:
    """One model of an evaluation."""

    name: str  # for tables
    path: str  # as given
    pipeline: ImagePipeline
    shape: tuple[int, int, int]  # (C, H, W) of its images
    digest: str  # of its weights


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    results: dict[str, Any]  # the contents of results.json
    pictures: list[dict[str, Tensor]]  # of each row "first" and "closest", uint8; in the first process only
    sides: dict[tuple[int, int, int], RealSide]  # by the shape of an image


def evaluate(
    models: Sequence[str],
    settings: Settings,
    output: str | Path,
    *,
    cache: str | Path | None = None,
    device: str | None = None,
    text_encoder: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure models and write results.json, table.md, report.html and pictures; rows that are there stay.

    Args:
        models: run folders, saved pipelines or Hub ids.
        settings: what is measured.
        output: folder; one that holds rows of the same models and settings is resumed.
        cache: folder of features of real sets; None for `files.default_cache()`.
        device: "cpu", "cuda" or "mps"; None for the best there is.
        text_encoder: where the frozen encoder of texts is now; None for where it was in training.
        overwrite: replace the report of another request; its rows stay, and those that fit are used.

    Returns:
        The contents of results.json.

    Raises:
        UserError: a model, dataset, feature network, solver or device that is not there or does not fit, or
            the report of another request in `output`.
    """
    where = join_launch(device)
    opened = [open_model(path, where, settings.dtype) for path in models]
    _name_apart(opened)
    if text_encoder is not None:
        readers = [model.pipeline for model in opened if model.pipeline.config.get("prompt_encoder")]
        for pipeline in readers or [opened[0].pipeline]:  # which says that it reads no prompts
            pipeline.load_text_encoder(text_encoder)
    wanted = [(model, request) for model in opened for request in _requests(model, settings)]
    if not wanted:
        raise UserError(
            "nothing is left to measure: no model has an average velocity; train one with "
            "`lediflow train ... --stage meanflow`, or give another --solver, such as midpoint"
        )
    return evaluate_rows(wanted, settings, Path(output), cache=cache, overwrite=overwrite).results


def evaluate_rows(
    wanted: Sequence[tuple[Model, Request]],
    settings: Settings,
    output: Path,
    *,
    cache: str | Path | None = None,
    overwrite: bool = False,
) -> Evaluation:
    """Do what `evaluate` does for rows that are chosen one by one; the models lie on one device.

    Args:
        wanted: at least one row; of `settings`, steps and solvers are not read.
        settings: what is measured.
        output: as for `evaluate`.
        cache: as for `evaluate`.
        overwrite: as for `evaluate`.
    """
    models = list({model.name: model for model, _ in wanted}.values())
    where, first = models[0].pipeline.device, PartialState().is_main_process
    claim(output, _request(models, wanted, settings, where), overwrite)  # before hours of work
    sides, notes = _real_sides(models, settings, Path(cache) if cache else default_cache(), where)
    keys = [_key(model, sides[model.shape], request, settings, where) for model, request in wanted]
    # which rows are there is for one process to say: the others may see another disk
    (kept,) = broadcast_object_list([[read_row(output / "rows" / key) for key in keys]])
    lpips = Lpips(where) if settings.lpips and first else None
    rows, pictures = [], []
    for (model, request), key, found in zip(wanted, keys, kept, strict=True):
        side, label = sides[model.shape], _label(model, request)
        say(f"{label}: {'measured before' if found else f'{request.num_images} images'}")
        if found is None:
            features = generated_features(model.pipeline, request, side.networks)
            if first:
                found = _measured(model, side, request, settings, features, lpips)
                write_row(output / "rows" / key, *found)
        if first:
            rows.append(found[0] | {"model": model.name, "path": model.path})
            pictures.append(found[1])
    results: dict[str, Any] = {}
    if first:
        times = _timings([(model.pipeline, request) for model, request in wanted], keys, output)
        rows = [row | taken for row, taken in zip(rows, times, strict=True)]
        results = _results(settings, models, sides, rows, notes, where)
        references = {shape: side.reference for shape, side in sides.items()}
        with explained(output):
            write_text(output / "results.json", json.dumps(results, indent=1))
            write_report(results, pictures, references, output)
    (results,) = broadcast_object_list([results])
    return Evaluation(results, pictures, sides)


def _request(
    models: list[Model], wanted: Sequence[tuple[Model, Request]], settings: Settings, device: torch.device
) -> dict[str, Any]:
    """All that a report depends on but the contents of the data, in words."""
    asked = asdict(settings)
    for name in ("steps", "solvers", "latent_solver", "latent_steps", "prompts"):  # told by the rows
        del asked[name]
    for name in ("data", "validation"):
        asked[name] = asked[name] and local_name(asked[name])
    return {
        "models": [f"{model.name} (weights {model.digest[:8]})" for model in models],
        **asked,
        "rows": [_label(model, request) for model, request in wanted],
        "device": device.type,
        "torch_threads": torch.get_num_threads(),
        "lediflow": __version__,
    }


def join_launch(device: str | None) -> torch.device:
    """Join the processes that torchrun or `accelerate launch` started, if any; return this one's device.

    Raises:
        UserError: an unknown device, or one that is not there.
    """
    where = check_device(device)
    state = PartialState(cpu=where.type == "cpu", timeout=PATIENCE)
    return where if state.num_processes == 1 else state.device


def open_model(path: str | Path, device: torch.device, dtype: str, *, name: str | None = None) -> Model:
    """Load a model for an evaluation; `name` is for tables, by default the end of the path.

    Raises:
        UserError: there is no such model, or its images are not square.
    """
    pipeline = load_pipeline(path).to(device)
    pipeline.set_progress_bar_config(disable=True)
    settled = pipeline.settle(steps=1, latent_steps=1)
    request = Request(**settled, num_images=1, seed=0, batch_size=1, dtype=dtype)
    channels, height, width = request.images(pipeline, range(1)).images.shape[1:]
    if height != width:
        raise UserError(f"{path} makes images of {height}x{width}; only square ones can be evaluated")
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    if name is None:
        name = "/".join(Path(path).parts[-2 if Path(path).name in (*STAGES, "pipeline") else -1 :])
    return Model(name, str(path), pipeline, (channels, height, width), weights_digest(*networks))


def _name_apart(models: list[Model]) -> None:
    """Give models of the same last name their whole path."""
    names = [model.name for model in models]
    for model in models:
        if names.count(model.name) > 1:
            model.name = model.path
    if len({model.name for model in models}) < len(models):
        raise UserError("the same model was given twice")


def _requests(model: Model, settings: Settings) -> list[Request]:
    """Return the rows of a model: every solver that it has by every number of steps and guidance."""
    solvers = settings.solvers or ("mean", "midpoint")
    if not model.pipeline.flow.average_velocity:
        if "mean" in settings.solvers:
            say(f"{model.name}: no row with solver mean, because the model has no average velocity")
        solvers = tuple(solver for solver in solvers if solver != "mean")
    latent = {name: getattr(settings, name) for name in ("latent_solver", "latent_steps")}
    try:
        return [
            settings.request(
                **model.pipeline.settle(solver=solver, steps=steps, **latent),
                **strengths,
                prompts=settings.drawn_from(model.pipeline),
            )
            for solver in solvers
            for steps in settings.steps
            for strengths in settings.strengths(model.pipeline)
        ]
    except UserError as error:
        raise UserError(f"{model.name}: {error}") from None


def _real_sides(
    models: list[Model], settings: Settings, cache: Path, device: torch.device
) -> tuple[dict[tuple[int, int, int], RealSide], list[str]]:
    """Return the real images at each size of image that the models make, and what to say about them."""
    sides: dict[tuple[int, int, int], RealSide] = {}
    notes: list[str] = []
    for shape in dict.fromkeys(model.shape for model in models):
        say(f"real images of {shape[1]} px: {settings.data}")
        sides[shape], found = notes_of(partial(open_real_side, shape, settings, cache, device))
        notes += found + count_notes(sides[shape], settings)
    if len(sides) > 1:
        notes.append(
            "the models make images of different sizes, and each is measured against real images of its own "
            "size: their numbers do not compare"
        )
    return sides, notes


def _label(model: Model, request: Request) -> str:
    words, guided = latent_words(asdict(request)), strength_words(asdict(request))
    latent = f" (latent sampler: {words})" if words else ""
    told = ", made of texts" if request.prompts else ""
    return f"{model.name}, {in_words(request.solver, request.steps)}{latent}{guided and f', {guided}'}{told}"


def _measured(
    model: Model,
    side: RealSide,
    request: Request,
    settings: Settings,
    features: list[Tensor],
    lpips: Lpips | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a row without its times, and its pictures."""
    pipeline, many = model.pipeline, {"replicates": settings.bootstrap, "seed": settings.seed}
    metrics: dict[str, dict[str, float]] = {}
    notes: list[str] = []
    closest: list[dict[str, float]] = []
    for network, generated in zip(side.networks, features, strict=True):
        real = side.features[network.name]
        found, warned = notes_of(partial(distances, network, generated, real, **many))
        unseen = None if side.unseen is None else side.unseen[network.name]
        share, nearby = copies(generated, real, unseen, **many)
        metrics |= named(network, found | {"copies": share})
        notes += warned
        closest = closest or nearby
    if isinstance(pipeline, LeDiFlowPipeline) and min(model.shape[1:]) >= 11 and in_pixels(pipeline):
        real_images = side.held_out or side.reference
        pixels = real_images.pixels(range(min(RECONSTRUCTIONS, len(real_images))))
        again = reconstruction(pipeline, pixels, request, lpips=lpips, replicates=settings.bootstrap)
        metrics |= {name: asdict(value) for name, value in again.items()}
    row = {
        "model": model.name,
        "path": model.path,
        "kind": type(pipeline).__name__,
        **asdict(request),
        "metrics": metrics,
        "closest": closest,
        "notes": notes,
    }
    copied = [request.images(pipeline, range(int(c["image"]), int(c["image"]) + 1)).images for c in closest]
    shown = {
        "first": to_uint8(request.images(pipeline, range(SHOWN_IMAGES)).images).cpu(),
        "closest": to_uint8(torch.cat(copied)).cpu(),
    }
    return row, shown


def _timings(
    timed: list[tuple[ImagePipeline, Request]], keys: list[str], output: Path
) -> list[dict[str, Any]]:
    """Return the times of all rows, which are taken together: times from different hours do not compare."""
    name = hashlib.blake2b(" ".join(keys).encode(), digest_size=12).hexdigest()
    path = output / "rows" / f"times-{name}.json"
    with suppress(OSError, ValueError):  # none, or damaged: timed again
        return json.loads(path.read_text(encoding="utf-8"))
    say(f"timing {len(timed)} rows in turn")
    times = timings(timed)
    write_text(path, json.dumps(times, indent=1))
    return times


def _key(model: Model, side: RealSide, request: Request, settings: Settings, device: torch.device) -> str:
    """Digest of everything that a row depends on."""
    held_out = side.held_out.content_hash() if side.held_out else None
    facts = [
        FORMAT,
        __version__,
        model.digest,
        # a row without prompts is what it was before there were any
        {name: value for name, value in asdict(request).items() if name != "prompts" or value},
        [network.digest for network in side.networks],
        side.reference.content_hash(),
        held_out,
        settings.bootstrap,
        settings.lpips,
        device.type,
        torch.get_num_threads(),
    ]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def _results(
    settings: Settings,
    models: list[Model],
    sides: dict[tuple[int, int, int], RealSide],
    rows: list[dict[str, Any]],
    notes: list[str],
    device: torch.device,
) -> dict[str, Any]:
    real = [
        {
            "shape": shape,
            "reference_images": len(side.reference),
            "reference_hash": side.reference.content_hash(),
            "held_out_images": len(side.held_out) if side.held_out else 0,
            "floor_images": min(settings.num_images, len(side.held_out)) if side.held_out else 0,
            "floor": side.floor,
        }
        for shape, side in sides.items()
    ]
    notes = [*notes, *(note for row in rows for note in row.pop("notes"))]
    spread = max(row["timing_spread"] for row in rows)
    if spread > BUSY:
        notes.append(
            f"the times of one row scatter by up to {spread:.0%}: this machine was busy, so read small "
            "differences in time as none"
        )
    networks = next(iter(sides.values())).networks
    return {
        "lediflow": __version__,
        "settings": asdict(settings),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "features": [
            {"name": network.name, "digest": network.digest, "headline": f"{network.name}/{network.headline}"}
            for network in networks
        ],
        "models": [{"name": m.name, "path": m.path, "digest": m.digest, "shape": m.shape} for m in models],
        "real": real,
        "notes": list(dict.fromkeys(notes)),
        "rows": rows,
    }


def say(text: str) -> None:
    """Print a line of progress on stderr, once for all processes of a launch."""
    if PartialState().is_main_process:
        print(text, file=sys.stderr, flush=True)
