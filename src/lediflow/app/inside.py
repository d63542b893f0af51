"""*Inside*: what happens between noise and picture, as pictures, beside flow matching from noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lediflow import ode
from lediflow.app.limits import Limits
from lediflow.app.models import Models
from lediflow.conditions import Conditions
from lediflow.pictures import to_pil
from lediflow.pipelines.base import ImagePipeline

Shown = list[tuple[Image.Image, str]]  # pictures with captions
MOST_STEPS = 8


@dataclass(frozen=True)
class Inside:
    """One picture's way.

    Attributes:
        z: each channel of z as a grey picture.
        prior: mu, sigma and x ~ P_L.
        path: the state at each step, from x to the picture.
        baseline: the same of flow matching from noise; empty without a baseline.
        told: how far each way is and how many evaluations it took, a sentence each.
    """

    z: Shown
    prior: Shown
    path: Shown
    baseline: Shown
    told: str


@torch.no_grad()
def inside(models: Models, limits: Limits, *, seed: int, steps: int, class_name: str | None = None) -> Inside:
    """Look at how the first picture of a seed comes about.

    Args:
        models: the models.
        limits: of the page.
        seed: of the request.
        steps: of the flow and of the baseline, up to 8.
        class_name: None for the first.

    Raises:
        UserError: the model has no latent z, or a value is out of range.
    """
    pipeline = models.need_z()
    seed, steps = limits.seed(seed), limits.whole("steps", steps, MOST_STEPS)
    class_labels = models.class_labels(class_name)
    labels = pipeline.labels_of([0], class_labels, seed=seed)
    w = pipeline.noise(pipeline.auxiliary.z_shape, [0], seed, "w")
    z = pipeline.sample_z(w, labels).end
    prior = pipeline.prior(z)
    noise = pipeline.noise(pipeline.sample_shape, [0], seed, "x")
    x = prior.at(pipeline.temperature * noise)
    solution = _path(pipeline, labels.also(z=z), x, steps)
    sentences = [_told("From the learned prior", x, solution)]
    start = [(_picture(pipeline, prior.mean), "mu"), (_spread(prior.std), "sigma")]
    start.append((_picture(pipeline, x), "x ~ P_L"))
    path, beside = _frames(pipeline, solution), []
    if models.baseline is not None:
        plain = models.baseline
        labels = plain.labels_of([0], class_labels, seed=seed)
        x = plain.temperature * noise
        gaussian = _path(plain, labels, x, steps)
        sentences.append(_told("From noise", x, gaussian))
        beside = _frames(plain, gaussian)
    return Inside(_channels(z), start, path, beside, "\n\n".join(sentences))


def _path(pipeline: ImagePipeline, told: Conditions, x: Tensor, steps: int) -> ode.Solution:
    strengths = pipeline.settle_strengths(labels=told.labels)
    field = pipeline.field(
        pipeline.flow, told, strengths["guidance"], strengths["autoguidance"], pipeline.weak_flow, len(x)
    )
    return ode.integrate(field, x, steps=steps, solver=pipeline.settle()["solver"], trajectory=True)


def _frames(pipeline: ImagePipeline, solution: ode.Solution) -> Shown:
    states = solution.trajectory
    assert states is not None, "it was asked for"
    return [
        (_picture(pipeline, state), f"t = {float(t):.2f}")
        for state, t in zip(states, solution.times, strict=True)
    ]


def _told(start: str, x: Tensor, solution: ode.Solution) -> str:
    way = float((solution.end - x).square().mean().sqrt())
    return f"{start}: {solution.nfe:g} evaluations; each value moves by {way:.2f} (root mean square)."


def _picture(pipeline: ImagePipeline, state: Tensor) -> Image.Image:
    if pipeline.config.codec_space and pipeline.vae is None:
        pipeline.load_codec()
    images: Any = pipeline._finish(state.float(), {}, "pil").images
    return images[0]


def _spread(sigma: Tensor) -> Image.Image:
    """Return sigma as a grey picture: its mean over the channels, white where it is largest."""
    mean = sigma.float().mean(1, keepdim=True)
    return to_pil(2 * mean / mean.amax().clamp_min(1e-6) - 1)[0]


def _channels(z: Tensor) -> Shown:
    """Return each channel of z (1, c, h, w) as a grey picture, its range over all of z."""
    low, high = z.amin(), z.amax()
    grey = 2 * (z[0][:, None].float() - low) / (high - low).clamp_min(1e-6) - 1
    return [(image, f"channel {i}") for i, image in enumerate(to_pil(grey))]
