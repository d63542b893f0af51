"""Measure models side by side: every model, solver and number of steps is a row, kept as soon as it is done.

OUTPUT/rows/<key>.json          one measured row; <key> is a digest of all it depends on
OUTPUT/rows/<key>.safetensors   its first images, and those closest to training images
OUTPUT/rows/times-<keys>.json   the times of all rows of one evaluation, taken in turn
OUTPUT/results.json, table.md, report.html and the pictures are written from the rows
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lediflow import __version__
from lediflow.data.images import to_uint8
from lediflow.errors import UserError
from lediflow.evaluation.evaluation_report import write_report
from lediflow.evaluation.feature_networks import weights_digest
from lediflow.evaluation.measure import (
    Request,
    copies,
    distances,
    generated_features,
    in_pixels,
    notes_of,
    reconstruction,
    timings,
)
from lediflow.evaluation.pairs import Lpips
from lediflow.evaluation.ranks import from_first, is_first, join_launch
from lediflow.evaluation.real_side import RealSide, count_notes, named, open_real_side
from lediflow.evaluation.reference import default_cache
from lediflow.evaluation.sampling import in_words, latent_words
from lediflow.evaluation.settings import Settings
from lediflow.files import write_text, written_whole
from lediflow.pipelines.base import ImagePipeline, load_pipeline
from lediflow.pipelines.lediflow import LeDiFlowPipeline
from lediflow.training.processes import check_device
from lediflow.training.stage_config import STAGES

FORMAT = 1  # of a row: raise it when a metric changes its meaning
SHOWN_IMAGES = 12
RECONSTRUCTIONS = 256
BUSY = 0.25


@dataclass
class Model:
    """One model of an evaluation.

    Attributes:
        name: for tables.
        path: as given.
        pipeline: loaded.
        shape: (C, H, W) of its images.
        digest: of its weights.
    """

    name: str
    path: str
    pipeline: ImagePipeline
    shape: tuple[int, int, int]
    digest: str


def evaluate(
    models: Sequence[str],
    settings: Settings,
    output: str | Path,
    *,
    cache: str | Path | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Measure models and write results.json, table.md, report.html and pictures; rows that are there stay.

    Args:
        models: run folders, saved pipelines or Hub ids.
        settings: what is measured.
        output: folder; one that holds rows of the same models and settings goes on.
        cache: folder of features of real sets; None for `reference.default_cache()`.
        device: "cpu", "cuda" or "mps"; None for the best there is.

    Returns:
        The contents of results.json.

    Raises:
        UserError: a model, dataset, feature network, solver or device that is not there or does not fit.
    """
    where = join_launch(device) or check_device(device)
    output, cache = Path(output), Path(cache) if cache else default_cache()
    loaded = [_load(path, where, settings) for path in models]
    _name_apart(loaded)
    wanted = [(model, request) for model in loaded for request in _requests(model, settings)]
    if not wanted:
        raise UserError(
            "nothing is left to measure: no model has an average velocity; train one with "
            "`lediflow train ... --stage meanflow`, or give another --solver, such as midpoint"
        )
    loaded = [model for model in loaded if any(model is other for other, _ in wanted)]
    lpips = Lpips(where) if settings.lpips else None
    sides, notes = _real_sides(loaded, settings, cache, where)
    rows, pictures, timed, keys = [], [], [], []
    for model, request in wanted:
        key = _key(model, sides[model.shape], request, settings, where)
        row, shown = _row(model, sides[model.shape], request, settings, output / "rows" / key, lpips)
        rows.append(row)
        pictures.append(shown)
        timed.append((model.pipeline, request))
        keys.append(key)
    for row, times in zip(rows, _timings(timed, keys, output), strict=True):
        row |= times
    results = _results(settings, loaded, sides, rows, notes, where)
    if is_first():
        write_text(output / "results.json", json.dumps(results, indent=1))
        write_report(results, pictures, {shape: side.reference for shape, side in sides.items()}, output)
    return results


def _load(path: str, device: torch.device, settings: Settings) -> Model:
    pipeline = load_pipeline(path).to(device)
    pipeline.set_progress_bar_config(disable=True)
    request = Request(
        **pipeline.settle(steps=1, latent_steps=1), num_images=1, seed=0, batch_size=1, dtype=settings.dtype
    )
    channels, height, width = request.images(pipeline, range(1)).images.shape[1:]
    if height != width:
        raise UserError(f"{path} makes images of {height}x{width}; only square ones can be evaluated")
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    name = "/".join(Path(path).parts[-2 if Path(path).name in (*STAGES, "pipeline") else -1 :])
    return Model(name, path, pipeline, (channels, height, width), weights_digest(*parts))


def _name_apart(models: list[Model]) -> None:
    """Give models of the same last name their whole path."""
    names = [model.name for model in models]
    for model in models:
        if names.count(model.name) > 1:
            model.name = model.path
    if len({model.name for model in models}) < len(models):
        raise UserError("the same model was given twice")


def _requests(model: Model, settings: Settings) -> list[Request]:
    """Return the rows of a model: every solver that it has by every number of steps."""
    solvers = settings.solvers or ("mean", "midpoint")
    if not model.pipeline.flow.average_velocity:
        if "mean" in settings.solvers:
            _say(f"{model.name}: no row with solver mean, because the model has no average velocity")
        solvers = tuple(solver for solver in solvers if solver != "mean")
    names = ("num_images", "seed", "batch_size", "dtype")
    common: dict[str, Any] = {name: getattr(settings, name) for name in names}
    latent: dict[str, Any] = {
        "latent_solver": settings.latent_solver,
        "latent_steps": settings.latent_steps,
    }
    try:
        return [
            Request(**model.pipeline.settle(solver=solver, steps=steps, **latent), **common)
            for solver in solvers
            for steps in settings.steps
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
        _say(f"real images of {shape[1]} px: {settings.data}")
        sides[shape], found = notes_of(partial(open_real_side, shape, settings, cache, device))
        notes += found + count_notes(sides[shape], settings)
    if len(sides) > 1:
        notes.append(
            "the models make images of different sizes, and each is measured against real images of its own "
            "size: their numbers do not compare"
        )
    return sides, notes


def _row(
    model: Model, side: RealSide, request: Request, settings: Settings, path: Path, lpips: Lpips | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a row and its pictures: from `path` where they were measured before, else measured and kept."""
    kept = from_first(lambda: _read_row(path))
    label = f"{model.name}, {in_words(request.solver, request.steps)}"
    if words := latent_words(asdict(request)):
        label += f" (latent sampler: {words})"
    if kept is not None:
        _say(f"{label}: measured before")
        row, shown = kept
        return row | {"model": model.name, "path": model.path}, shown
    _say(f"{label}: {request.num_images} images")
    features = generated_features(model.pipeline, request, side.networks)
    # the first process alone measures; the others wait for its row
    row, shown = from_first(lambda: _measured(model, side, request, settings, features, lpips))
    if is_first():
        try:
            with written_whole(path.with_suffix(".safetensors")) as unfinished:
                save_file({name: tensor.contiguous() for name, tensor in shown.items()}, unfinished)
        except SafetensorError as error:
            raise OSError(str(error)) from None
        write_text(path.with_suffix(".json"), json.dumps(row, indent=1))
    return row, shown


def _timings(
    timed: list[tuple[ImagePipeline, Request]], keys: list[str], output: Path
) -> list[dict[str, Any]]:
    """Return the times of all rows, which are taken together: times from different hours do not compare."""
    name = hashlib.blake2b(" ".join(keys).encode(), digest_size=12).hexdigest()
    path = output / "rows" / f"times-{name}.json"

    def take() -> list[dict[str, Any]]:
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        _say(f"timing {len(timed)} rows in turn")
        times = timings(timed)
        write_text(path, json.dumps(times, indent=1))
        return times

    return from_first(take)


def _measured(
    model: Model,
    side: RealSide,
    request: Request,
    settings: Settings,
    features: list[Tensor],
    lpips: Lpips | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
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


def _key(model: Model, side: RealSide, request: Request, settings: Settings, device: torch.device) -> str:
    """Digest of everything that a row depends on."""
    held_out = side.held_out.content_hash() if side.held_out else None
    facts = [
        FORMAT,
        __version__,
        model.digest,
        asdict(request),
        [network.digest for network in side.networks],
        side.reference.content_hash(),
        held_out,
        settings.bootstrap,
        settings.lpips,
        device.type,
        torch.get_num_threads(),
    ]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def _read_row(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    try:
        row = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return row, load_file(path.with_suffix(".safetensors"))
    except (OSError, ValueError, SafetensorError):  # none, or damaged: measured again
        return None


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
    first = next(iter(sides.values())).networks
    return {
        "lediflow": __version__,
        "settings": asdict(settings),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "features": [
            {"name": network.name, "digest": network.digest, "headline": f"{network.name}/{network.headline}"}
            for network in first
        ],
        "models": [{"name": m.name, "path": m.path, "digest": m.digest, "shape": m.shape} for m in models],
        "real": real,
        "notes": list(dict.fromkeys(notes)),
        "rows": rows,
    }


def _say(text: str) -> None:
    if is_first():
        print(text, file=sys.stderr, flush=True)
