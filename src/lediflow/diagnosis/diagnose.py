"""From a model and its data to a diagnosis: measurements.py measures, findings.py judges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lediflow.devices import check_device
from lediflow.diagnosis import measurements as m
from lediflow.diagnosis.findings import findings, verdict
from lediflow.errors import UserError
from lediflow.evaluation.measure import in_pixels
from lediflow.evaluation.real import RealImages
from lediflow.pipelines.flow_matching import FlowMatchingPipeline
from lediflow.pipelines.lediflow import LeDiFlowPipeline
from lediflow.pipelines.load import load_pipeline
from lediflow.progress import Progress

FEWEST = 50  # images of each kind
PATHS = 64


def diagnose(
    model: str | Path,
    data: str,
    *,
    validation: str | None = None,
    num_images: int = 512,
    latent_solver: str | None = None,
    latent_steps: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: str | None = None,
) -> dict[str, Any]:
    """Measure whether the learned prior of a model helps, and why not where it does not.

    Args:
        model: run folder or pipeline of LeDiFlow. Where RUN/baseline is trained, its paths stand beside. The
            paths of a distilled flow, which has only learned their ends, are those of what it learned from.
        data: DATASET the model was trained on.
        validation: DATASET of held-out images; None for that split of `data`, else other training images.
        num_images: images of each kind, at least 50.
        latent_solver: of the latent sampler; None for "mean" where it has an average velocity, else
            "midpoint".
        latent_steps: its steps; None for 1 with "mean", else 4.
        seed: of all noise.
        batch_size: images at a time.
        device: "cpu", "cuda" or "mps"; None for the best there is.

    Returns:
        {"numbers": what was measured, "findings": a list of `Finding` as dicts, "verdict": a sentence}.

    Raises:
        UserError: plain flow matching, a codec's latents, too few images, or a model or dataset not there.
    """
    where = check_device(device)
    pipeline = load_pipeline(model).to(where)
    if not isinstance(pipeline, LeDiFlowPipeline):
        raise UserError(f"{model} is plain flow matching: it has no learned prior to diagnose")
    if not in_pixels(pipeline):
        raise UserError(f"{model} works on a codec's latents; only models of pixels can be diagnosed")
    if num_images < FEWEST or batch_size < 1:
        raise UserError(
            f"a diagnosis needs at least {FEWEST} images (num_images) and a batch_size of at least 1"
        )
    latent = pipeline.settle(latent_solver=latent_solver, latent_steps=latent_steps)
    latent = {name: latent[f"latent_{name}"] for name in ("solver", "steps")}
    train, unseen = _images(pipeline, data, validation, num_images)
    others = _baseline(model, where), _teacher(model, where)
    with torch.no_grad():
        numbers = _numbers(pipeline, *others, train, unseen, latent, seed, batch_size)
    found = findings(numbers)
    return {
        "model": str(model),
        "data": data,
        "images": len(unseen),
        "numbers": numbers,
        "findings": [asdict(finding) for finding in found],
        "verdict": verdict(numbers, found),
    }


def _numbers(
    pipeline: LeDiFlowPipeline,
    baseline: FlowMatchingPipeline | None,
    teacher: LeDiFlowPipeline | None,
    train: RealImages,
    unseen: RealImages,
    latent: dict[str, Any],
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    auxiliary, where = pipeline.auxiliary, pipeline.device
    at = {"batch_size": batch_size, "device": where}
    paths: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    parts = 4 + pipeline.sampler.average_velocity + (baseline is not None)
    flows = [p.flow for p in (pipeline, baseline, teacher) if p is not None]
    with _watched([pipeline.sampler, *flows], parts) as begin:
        begin("images to z and back")
        y_train, _, z_train = m.encode(auxiliary, train, seed=seed, **at)
        y, posterior, z = m.encode(auxiliary, unseen, seed=seed + 1, **at)
        prior, prior_train = m.decode(auxiliary, z, **at), m.decode(auxiliary, z_train, **at)
        begin("samples of z")
        sampled = {
            name: m.sampled_latents(pipeline, len(z), **how, **paths)
            for name, how in (("sampled", latent), ("sampled_many", {"steps": m.MANY_LATENT_STEPS}))
        }
        mean, std = auxiliary.z_mean.cpu(), auxiliary.z_std.cpu()
        some = sampled["sampled"][:PATHS] * std + mean
        begin("what they are worth")
        numbers = {
            "transport": m.transport(y, prior),
            "calibration": m.calibration(y, prior),
            "calibration_train": m.calibration(y_train, prior_train),
            "sigma": m.sigma_floor(prior),
            "channels": m.channels(posterior),
            "latent_sampler": latent,
            "latent_gap": m.latent_gap((z_train - mean) / std, (z - mean) / std, sampled),
        }
        begin("paths of the flow")
        numbers["curvature"] = m.prior_curvature(pipeline, some, **paths, paths_of=teacher)
        if pipeline.sampler.average_velocity:
            begin("paths of the latent sampler")
            numbers["sampler_curvature"] = m.sampler_curvature(pipeline, len(some), **paths)
        if baseline is not None:
            begin("paths of the baseline")
            numbers["baseline_curvature"] = m.gaussian_curvature(baseline, y.shape[1:], len(some), **paths)
    return numbers


@contextmanager
def _watched(networks: list[torch.nn.Module], parts: int) -> Iterator[Callable[[str], None]]:
    """Show which part is under way, with a sign of life when a network runs; give what begins one."""
    begun, name = 0, ""
    with Progress("diagnose", 0, parts) as progress, ExitStack() as hooks:

        def show(*_: object) -> None:
            progress.update(begun - 1, name)

        def begin(what: str) -> None:
            nonlocal begun, name
            begun, name = begun + 1, what
            show()

        for network in networks:
            hooks.callback(network.register_forward_hook(show).remove)
        yield begin
        progress.update(parts)


def _images(
    pipeline: LeDiFlowPipeline, data: str, validation: str | None, num_images: int
) -> tuple[RealImages, RealImages]:
    """Return training images and held-out ones, at the model's size."""
    config = pipeline.auxiliary.config
    side = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    shape = (config.in_channels, side, side)
    train = RealImages(data, "train", shape, num_images)
    held_out = (validation, "train") if validation else (data, "validation")
    try:
        unseen = RealImages(*held_out, shape, num_images)
    except UserError as error:
        raise UserError(f"{error}. A diagnosis needs held-out images: give --validation DATASET") from None
    if min(len(train), len(unseen)) < FEWEST:
        raise UserError(
            f"a diagnosis needs at least {FEWEST} training and as many held-out images, "
            f"not {len(train)} and {len(unseen)}"
        )
    return train, unseen


def _baseline(model: str | Path, device: torch.device) -> FlowMatchingPipeline | None:
    folder = Path(model) / "baseline"
    if not (folder / "pipeline" / "model_index.json").is_file():
        return None
    pipeline = load_pipeline(folder).to(device)
    return pipeline if isinstance(pipeline, FlowMatchingPipeline) else None


def _teacher(model: str | Path, device: torch.device) -> LeDiFlowPipeline | None:
    """Return what a distilled model of a run folder learned from, or None for any other model."""
    path = Path(model)
    if path.name == "distill":
        teacher = path.parent / "flow"
    elif _trained(path, "meanflow-distill"):
        teacher = path / "meanflow"
    elif _trained(path, "distill") and not _trained(path, "meanflow"):
        teacher = path / "flow"
    else:
        return None
    if not (teacher / "pipeline" / "model_index.json").is_file():
        return None
    pipeline = load_pipeline(teacher).to(device)
    return pipeline if isinstance(pipeline, LeDiFlowPipeline) else None


def _trained(run: Path, stage: str) -> bool:
    return (run / stage / "checkpoints").is_dir()
