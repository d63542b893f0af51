"""All metrics of one set of generated images, and of one model at one solver and number of steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lediflow import ode
from lediflow.data.images import to_float, to_uint8
from lediflow.evaluation.bootstrap import Estimate, estimate, estimate_mean, resampled
from lediflow.evaluation.feature_networks import FeatureNetwork
from lediflow.evaluation.kernels import CMMD, KID
from lediflow.evaluation.latency import compare, part_shares
from lediflow.evaluation.manifold import closer_than_new, manifold, nearest_neighbours
from lediflow.evaluation.metrics import frechet_distance, frechet_replicates
from lediflow.evaluation.pairs import psnr, ssim
from lediflow.evaluation.ranks import in_batches
from lediflow.evaluation.reference import RealFeatures
from lediflow.pipelines.base import ImagePipeline
from lediflow.pipelines.guidance import velocity_field
from lediflow.pipelines.lediflow import LeDiFlowPipeline
from lediflow.precision import DTYPES
from lediflow.sources import image_noise

MOST_ON_MANIFOLDS = 10_000


@dataclass(frozen=True)
class Request:
    """How a row's images are made.

    Attributes:
        solver: of the flow.
        steps: of the flow.
        num_images: how many.
        seed: image i depends on (seed, i) only.
        batch_size: images at a time, and the batch that is timed.
        dtype: fp32, bf16 or fp16.
        latent_solver: of the latent sampler; None for plain flow matching, or the pipeline's default.
        latent_steps: of the latent sampler, likewise.
    """

    solver: str
    steps: int
    num_images: int
    seed: int
    batch_size: int
    dtype: str
    latent_solver: str | None = None
    latent_steps: int | None = None

    def images(self, pipeline: ImagePipeline, indices: range) -> Any:
        """Make the images `indices`; return the pipeline's output, images (n, C, H, W) in [-1, 1].

        A model with classes makes all of them in turn.
        """
        options: dict[str, Any] = {}
        if hasattr(pipeline, "sampler"):
            options = {"latent_solver": self.latent_solver, "latent_steps": self.latent_steps}
        return pipeline(
            len(indices),
            first_image=indices.start,
            steps=self.steps,
            solver=self.solver,
            seed=self.seed,
            batch_size=self.batch_size,
            dtype=DTYPES[self.dtype],
            output_type="pt",
            **options,
        )


def generated_features(
    pipeline: ImagePipeline, request: Request, networks: list[FeatureNetwork]
) -> list[Tensor]:
    """Make a row's images, batch by batch, and return their features (N, D) by each network."""

    def batch(indices: range) -> list[Tensor]:
        pixels = to_uint8(request.images(pipeline, indices).images)
        return [network(pixels) for network in networks]

    return in_batches(request.num_images, request.batch_size, batch)


def distances(
    network: FeatureNetwork, generated: Tensor, real: RealFeatures, *, replicates: int, seed: int
) -> dict[str, Estimate]:
    """Return every metric of generated features against the real ones, by name.

    Intervals resample the generated images; those of recall and coverage, which are shares of the real
    images, resample these.

    Args:
        network: whose features they are.
        generated: (N, D).
        real: of the reference.
        replicates: of the bootstrap; 0 for none.
        seed: of the bootstrap.

    Warns:
        UserWarning: a count for which a metric misleads.
    """
    counts = resampled(len(generated), replicates, seed=seed)
    found = {}
    for name, metric, within in (
        (network.mmd_name, CMMD, real.within_mmd),
        (network.kernel_name, KID, real.within_kernel),
    ):
        value = metric(generated, real.features, within_y=within).item()
        spread = (
            metric(generated, real.features, counts=counts, within_y=within) if replicates else counts[:, 0]
        )
        found[name] = estimate(value, spread, least=metric.least)
    value = frechet_distance(generated, real.moments)
    found[network.frechet_name] = estimate(
        value, frechet_replicates(generated, real.moments, counts), least=0.0
    )
    return found | _shares(generated, real.features, replicates=replicates, seed=seed)


def _shares(generated: Tensor, real: Tensor, *, replicates: int, seed: int) -> dict[str, Estimate]:
    """Precision, density, recall and coverage at equal counts of both sets."""
    count = min(len(generated), len(real), MOST_ON_MANIFOLDS)
    spread = torch.linspace(0, len(real) - 1, count, dtype=torch.float64).round().long()
    found = manifold(generated[:count], real[spread])
    counts = resampled(count, replicates, seed=seed + 1)
    return {
        name: estimate_mean(
            getattr(found, name), counts, least=0.0, most=torch.inf if name == "density" else 1.0
        )
        for name in ("precision", "density", "recall", "coverage")
    }


def copies(
    generated: Tensor, real: RealFeatures, unseen: Tensor | None, *, replicates: int, seed: int
) -> tuple[Estimate, list[dict[str, float]]]:
    """Look for training images among the generated ones.

    Args:
        generated: features (N, D).
        real: of the training images.
        unseen: features of real images not trained on; None compares with the training images' distances
            to each other.
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The share of generated images that lie closer to a training image than 99 of 100 new ones do, and
        the eight closest: {"image", "training_image", "distance"}.
    """
    distance, index = nearest_neighbours(generated, real.features)
    if unseen is None:
        yardstick, _ = nearest_neighbours(real.features, real.features, itself=True)
    else:
        yardstick, _ = nearest_neighbours(unseen, real.features)
    counts = resampled(len(generated), replicates, seed=seed + 2)
    share = estimate_mean(closer_than_new(distance, yardstick), counts, least=0.0, most=1.0)
    closest = distance.argsort()[:8].tolist()
    return share, [
        {"image": i, "training_image": int(index[i]), "distance": distance[i].item()} for i in closest
    ]


def timings(rows: Sequence[tuple[ImagePipeline, Request]]) -> list[dict[str, Any]]:
    """Return evaluations and milliseconds for one image of a batch, whole and by network, of several rows.

    The rows take turns, so that the machine's drift meets all alike. "other" is what no network takes: noise
    and the solver's arithmetic.
    """

    def call(pipeline: ImagePipeline, request: Request) -> dict[str, int]:
        return request.images(pipeline, range(request.batch_size)).nfe

    pipeline, request = rows[0]
    wholes = compare(
        {str(i): partial(call, *row) for i, row in enumerate(rows)},
        images=request.batch_size,
        repeats=3,
        device=pipeline.device,
    )
    found = []
    for (pipeline, request), whole in zip(rows, wholes.values(), strict=True):
        nfe: dict[str, int] = {}
        shares = part_shares(
            lambda p=pipeline, r=request, n=nfe: n.update(call(p, r)),  # type: ignore[misc]
            _parts(pipeline),
            repeats=2,
            device=pipeline.device,
        )
        parts = {name: share * whole.ms_per_image for name, share in shares.items()}
        parts["other"] = whole.ms_per_image - sum(parts.values())
        found.append(
            {
                "nfe": nfe,
                "ms_per_image": {"total": whole.ms_per_image, **parts},
                "images_per_second": whole.images_per_second,
                "timing_spread": whole.spread,
            }
        )
    return found


def _parts(pipeline: ImagePipeline) -> dict[str, tuple[Any, str]]:
    parts: dict[str, tuple[Any, str]] = {"flow": (pipeline.flow, "forward")}
    if isinstance(pipeline, LeDiFlowPipeline):
        parts |= {"sampler": (pipeline.sampler, "forward"), "decoder": (pipeline.auxiliary, "decode")}
    if getattr(pipeline, "vae", None) is not None:
        parts["codec"] = (pipeline.vae, "decode")
    return parts


def in_pixels(pipeline: LeDiFlowPipeline) -> bool:
    """Whether the model works on pixels, not on a codec's latents."""
    return pipeline.config.latent_space is None


@torch.no_grad()
def reconstruct(pipeline: LeDiFlowPipeline, y: Tensor, request: Request) -> Tensor:
    """Return images y (N, C, H, W) in [-1, 1] after encoder, prior and flow: z is the mean of q(z|y).

    A model with classes is asked without one.
    """
    ends = []
    for start in range(0, len(y), request.batch_size):
        batch = y[start : start + request.batch_size].to(pipeline.device)
        with torch.autocast(
            pipeline.device.type, dtype=DTYPES[request.dtype], enabled=request.dtype != "fp32"
        ):
            z = pipeline.auxiliary.encode(batch).mean
            indices = range(start, start + len(batch))
            noise = image_noise(
                batch.shape[1:], seed=request.seed, indices=indices, stream="x", device=pipeline.device
            )
            x = pipeline.auxiliary.decode(z).at(noise)
            solution = ode.integrate(
                velocity_field(pipeline.flow, z, pipeline.no_class(len(batch)))[0],
                x,
                steps=request.steps,
                solver=request.solver,
            )
        ends.append(solution.end.float().clamp(-1, 1).cpu())
    return torch.cat(ends)


def reconstruction(
    pipeline: LeDiFlowPipeline,
    pixels: Tensor,
    request: Request,
    *,
    lpips: Callable[[Tensor, Tensor], Tensor] | None,
    replicates: int,
) -> dict[str, Estimate]:
    """Return PSNR, SSIM and, where `lpips` is given, LPIPS of reconstructions of real images, by name.

    Args:
        pipeline: the model.
        pixels: real images, uint8 (N, C, H, W).
        request: solver, steps and seed.
        lpips: of `pairs.Lpips`, or None.
        replicates: of the bootstrap over images.
    """
    y = to_float(pixels)
    again = reconstruct(pipeline, y, request)
    metrics: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
    if lpips is not None:
        metrics["lpips"] = lpips
    counts = resampled(len(y), replicates, seed=request.seed)
    return {f"reconstruction/{name}": estimate_mean(f(again, y), counts) for name, f in metrics.items()}


def notes_of(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Call a function; return its result and the texts of the warnings it gave for the user."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
