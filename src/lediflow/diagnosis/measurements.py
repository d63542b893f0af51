"""Does the learned prior help here, and if not, why? Measurements of a trained LeDiFlow, one function each.

The paper's first limitation is that a bad prior can be worse than a Gaussian one. What can go wrong is taken
apart: where paths start, how bent they are, how honest sigma is, whether sampled z look like encoded z, and
what z carries. findings.py judges the numbers. The calls into pipelines are in the last four functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lediflow import ode
from lediflow.conditions import Conditions
from lediflow.evaluation.real import RealImages
from lediflow.fields import Field, conditional
from lediflow.gaussian import DiagonalGaussian
from lediflow.metrics.kernels import gaussian_kernel, mean_kernel, mmd_squared, squared_distances
from lediflow.metrics.manifold import manifold
from lediflow.networks.auxiliary import PRIOR_LOG_VAR, AuxiliaryModel
from lediflow.pictures import to_float
from lediflow.pipelines.flow_matching import FlowMatchingPipeline
from lediflow.pipelines.lediflow import LeDiFlowPipeline
from lediflow.sources import image_noise

FINE_STEPS = 64
STEPS = (1, 2, 4, 8)
MANY_LATENT_STEPS = 16
TIMES = 8  # of the profile of straightness
NEAR_FLOOR = 0.5  # in log-variance: the clamp is soft, so its end is never reached
GREY_LEVELS = 127.5  # of an image in [-1, 1]


def encode(
    auxiliary: AuxiliaryModel, images: RealImages, *, seed: int, batch_size: int, device: torch.device
) -> tuple[Tensor, DiagonalGaussian, Tensor]:
    """Return images y (N, C, H, W) in [-1, 1], q(z|y), and one z (N, c, h, w) drawn from it for each."""
    y = to_float(images.pixels(range(len(images))))
    posterior = _joined(auxiliary.encode(batch.to(device)) for batch in y.split(batch_size))
    noise = image_noise(auxiliary.z_shape, seed=seed, indices=range(len(y)), stream="posterior")
    return y, posterior, posterior.at(noise)


def decode(
    auxiliary: AuxiliaryModel, z: Tensor, *, batch_size: int, device: torch.device
) -> DiagonalGaussian:
    """Return P_L for z (N, c, h, w), on the CPU."""
    return _joined(auxiliary.decode(batch.to(device)) for batch in z.split(batch_size))


def _joined(parts: Iterable[DiagonalGaussian]) -> DiagonalGaussian:
    means, log_vars = zip(*((part.mean.cpu(), part.log_var.cpu()) for part in parts), strict=True)
    return DiagonalGaussian(torch.cat(means), torch.cat(log_vars))


def transport(y: Tensor, prior: DiagonalGaussian) -> dict[str, float]:
    """Return E|y - x|² per element for x from P_L, from N(0, I), and from one Gaussian per pixel.

    In closed form over x: |y - mu|² + sigma². The last start knows each pixel's mean and variance over the
    data and nothing of z; what P_L costs less is what z is worth.

    Args:
        y: images (N, C, H, W).
        prior: P_L at z drawn from q(z|y), same shape.
    """
    y = y.double()
    residual = (y - prior.mean.double()).square() + prior.std.double().square()
    return {
        "learned": residual.mean().item(),
        "gaussian": (y.square().mean() + 1).item(),
        "per_pixel_gaussian": 2 * y.var(0, unbiased=False).mean().item(),
    }


def calibration(y: Tensor, prior: DiagonalGaussian) -> dict[str, float]:
    """Return how honest sigma is: residuals (y - mu) / sigma should be standard normal.

    Returns:
        "residual_std", 1 when honest; "within_1_sigma", 0.683; "within_2_sigma", 0.954; "nll", the mean
        -log density in nats per element.
    """
    residual = (y.double() - prior.mean.double()) / prior.std.double()
    return {
        "residual_std": residual.square().mean().sqrt().item(),
        "within_1_sigma": (residual.abs() < 1).double().mean().item(),
        "within_2_sigma": (residual.abs() < 2).double().mean().item(),
        "nll": prior.nll(y).double().mean().item(),
    }


def sigma_floor(prior: DiagonalGaussian) -> dict[str, float]:
    """Return the share of elements whose sigma is at the clamp's floor, that floor, and the median sigma."""
    at_floor = prior.log_var < PRIOR_LOG_VAR[0] + NEAR_FLOOR
    return {
        "share_at_floor": at_floor.double().mean().item(),
        "floor": DiagonalGaussian(torch.zeros(1), torch.tensor([PRIOR_LOG_VAR[0]])).std.item(),
        "median": prior.std.median().item(),
    }


def channels(posterior: DiagonalGaussian) -> list[dict[str, float]]:
    """Return what each channel of z carries, over the images of q(z|y) (N, c, h, w).

    Returns:
        For each channel "kl", nats per image; "spread", the variance of q's mean over the images, averaged
        over places (Burda et al., "Importance weighted autoencoders", 2016, call a unit active above 0.01);
        and "signal", its share of the whole variance of z, 0 to 1.
    """
    mean, variance = posterior.mean.double(), posterior.log_var.double().exp()
    kl = posterior.kl().double().sum((2, 3)).mean(0)
    spread = mean.var(0).mean((1, 2))
    signal = spread / (spread + variance.mean((0, 2, 3)))
    return [
        {"kl": k, "spread": s, "signal": r}
        for k, s, r in zip(kl.tolist(), spread.tolist(), signal.tolist(), strict=True)
    ]


def latent_gap(encoded: Tensor, unseen: Tensor, sampled: dict[str, Tensor]) -> dict[str, Any]:
    """Return how far sampled z lie from encoded z: the unbiased squared MMD, and density and coverage.

    The MMD sees the whole; density and coverage (manifold.py) see whether each z lies where encoded ones do,
    and find faults that the MMD does not. Its kernel is Gaussian, as wide as the median distance between
    encoded z. For scale, "unseen" is the gap of other images' z, which should be 0 but for noise, and
    "gaussian" that of standard normal noise: what a latent sampler that has learnt nothing would leave.

    Args:
        encoded: z of training images, standardised, (N, ...).
        unseen: z of other images, standardised, (M, ...).
        sampled: z of the latent sampler by name, standardised, each (K, ...).

    Returns:
        By name: {"mmd", "share", "density", "coverage"}, the share being 0 for a gap as small as that of
        unseen images and 1 for one as large as that of noise; and "noise", the smallest difference of shares
        that means something.
    """
    flat = {
        "encoded": encoded,
        "unseen": unseen,
        "gaussian": image_noise(encoded.shape[1:], seed=0, indices=range(len(unseen)), stream="gap"),
        **sampled,
    }
    flat = {name: z.flatten(1).double() for name, z in flat.items()}
    width = squared_distances(flat["encoded"][:1000], flat["encoded"][:1000]).flatten().median().sqrt().item()
    kernel = gaussian_kernel(width)
    within = mean_kernel(flat["encoded"], kernel, unbiased=True).item()
    gaps = {
        name: mmd_squared(z, flat["encoded"], kernel, unbiased=True, within_y=within).item()
        for name, z in flat.items()
        if name != "encoded"
    }
    noise = _null_spread(flat["encoded"], flat["unseen"], kernel)
    scale = max(gaps["gaussian"] - gaps["unseen"], noise)
    count = min(map(len, flat.values()))
    found: dict[str, Any] = {"noise": 2 * noise / scale}
    for name, gap in gaps.items():
        near = manifold(flat[name][:count], flat["encoded"][:count])
        found[name] = {
            "mmd": gap,
            "share": (gap - gaps["unseen"]) / scale,
            "density": near.density.mean().item(),
            "coverage": near.coverage.mean().item(),
        }
    return found


def _null_spread(a: Tensor, b: Tensor, kernel: Any, draws: int = 20) -> float:
    """Standard deviation of the gap between sets that differ by chance only: both shuffled together."""
    pooled = torch.cat([a, b])
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(draws):
        order = torch.randperm(len(pooled), generator=generator)
        first, second = pooled[order[: len(a)]], pooled[order[len(a) :]]
        found.append(mmd_squared(second, first, kernel, unbiased=True).item())
    return torch.tensor(found).std().item()


def curvature(
    field: Field,
    x: Tensor,
    *,
    average: Field | None = None,
    solver: str = "midpoint",
    batch_size: int = 64,
    unit: float = GREY_LEVELS,
) -> dict[str, Any]:
    """Return how far few steps end from many, and how straight paths are.

    Args:
        field: of all rows of x (see `fields.py`).
        x: starts, (N, C, H, W), on the field's device.
        average: the field whose average velocity is measured; None where there is none.
        solver: of all step counts.
        batch_size: paths at a time.
        unit: distances in x are multiplied by it; grey levels of 255 for images in [-1, 1].

    Returns:
        "error", root-mean-square distance of the ends of 1, 2, 4, 8 steps from those of 64, by step count,
        with "euler_1" beside them, and "mean_1" for one step of the average velocity; "length", that of the
        64-step paths' chords, in the same unit; "straightness", E|v_t - chord|² / E|chord|² averaged over t,
        0 for straight paths (Liu et al., "Flow straight and fast", 2023, eq. 10, here relative to the
        chord); and "profile", the same in eighths of the path from start to end.
    """
    runs = {str(count): (count, solver) for count in STEPS} | {"euler_1": (1, "euler")}
    ends, bends, chords = [], [], []
    for start in range(0, len(x), batch_size):
        rows = slice(start, start + batch_size)
        velocity = field.rows(rows)
        fine = ode.integrate(velocity, x[rows], steps=FINE_STEPS, solver=solver, trajectory=True)
        assert fine.trajectory is not None, "it was asked for"
        chord = (fine.end - x[rows]).double()
        steps = fine.trajectory.diff(dim=0).double() * FINE_STEPS
        bends.append((steps - chord).square().flatten(2).mean(2).cpu())
        chords.append(chord.square().flatten(1).mean(1).cpu())
        found = {
            name: ode.integrate(velocity, x[rows], steps=count, solver=how).end
            for name, (count, how) in runs.items()
        }
        if average is not None:
            found["mean_1"] = ode.integrate(average.rows(rows), x[rows], steps=1, solver="mean").end
        ends.append({name: (end.double() - fine.end.double()).square() for name, end in found.items()})
    length = torch.cat(chords).mean()
    profile = torch.cat(bends, dim=1).mean(1) / length
    return {
        "error": {name: torch.cat([e[name] for e in ends]).mean().sqrt().item() * unit for name in ends[0]},
        "length": length.sqrt().item() * unit,
        "straightness": profile.mean().item(),
        "profile": profile.view(TIMES, -1).mean(1).tolist(),
    }


def sampled_latents(
    pipeline: LeDiFlowPipeline,
    count: int,
    *,
    steps: int,
    solver: str = "midpoint",
    seed: int,
    batch_size: int,
) -> Tensor:
    """Return z of the latent sampler, standardised, (count, c, h, w), on the CPU."""
    auxiliary, found = pipeline.auxiliary, []
    for start in range(0, count, batch_size):
        indices = range(start, min(start + batch_size, count))
        w = pipeline.noise(auxiliary.z_shape, indices, seed, "w")
        z = pipeline.sample_z(w, pipeline.labels_of(indices), steps=steps, solver=solver).end
        found.append(auxiliary.standardize(z).cpu())
    return torch.cat(found)


def sampler_curvature(
    pipeline: LeDiFlowPipeline, count: int, *, seed: int, batch_size: int
) -> dict[str, Any]:
    """Return `curvature` of the latent sampler from w, in standard deviations of z, all classes in turn."""
    w = pipeline.noise(pipeline.auxiliary.z_shape, range(count), seed, "w")
    field = conditional(pipeline.sampler, pipeline.labels_of(range(count)))
    average = field if pipeline.sampler.average_velocity else None
    return curvature(field, w, average=average, batch_size=batch_size, unit=1.0)


def prior_curvature(
    pipeline: LeDiFlowPipeline,
    z: Tensor,
    *,
    seed: int,
    batch_size: int,
    paths_of: LeDiFlowPipeline | None = None,
) -> dict[str, Any]:
    """Return `curvature` of the flow from P_L at given z (N, c, h, w), not standardised, without a class.

    Args:
        pipeline: the model, whose average velocity is measured where it has one.
        z: auxiliary latents.
        seed: of the noise x.
        batch_size: paths at a time.
        paths_of: the model whose velocity makes the paths, on the same auxiliary model; None for `pipeline`.
    """
    prior = decode(pipeline.auxiliary, z, batch_size=batch_size, device=pipeline.device)
    noise = image_noise(prior.mean.shape[1:], seed=seed, indices=range(len(z)), stream="x")
    x, conditions = prior.at(noise).to(pipeline.device), Conditions(z=z.to(pipeline.device))
    field = conditional((paths_of or pipeline).flow, conditions)
    average = conditional(pipeline.flow, conditions) if pipeline.flow.average_velocity else None
    return curvature(field, x, average=average, batch_size=batch_size)


def gaussian_curvature(
    pipeline: FlowMatchingPipeline, shape: Sequence[int], count: int, *, seed: int, batch_size: int
) -> dict[str, Any]:
    """Return `curvature` of plain flow matching from N(0, I), without a class."""
    x = pipeline.noise(shape, range(count), seed, "x")
    return curvature(conditional(pipeline.flow), x, batch_size=batch_size)
