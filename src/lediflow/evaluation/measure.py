"""What is measured of one model at one solver and number of steps: images, reconstructions, times.

The calls into pipelines are here: `Request.images`, `reconstruct` and `network_parts`.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lediflow.devices import DTYPES
from lediflow.evaluation.latency import compare, part_shares
from lediflow.evaluation.real import features_of
from lediflow.evaluation.request import Request
from lediflow.metrics.bootstrap import Estimate, estimate_mean, resampled
from lediflow.metrics.features import FeatureNetwork
from lediflow.metrics.pairs import psnr, ssim
from lediflow.pictures import to_float
from lediflow.pipelines.base import ImagePipeline
from lediflow.pipelines.lediflow import LeDiFlowPipeline
from lediflow.progress import Progress

SPLIT = 2  # timed requests of a row in which its networks are timed apart


def generated_features(
    pipeline: ImagePipeline, request: Request, networks: Sequence[FeatureNetwork]
) -> list[Tensor]:
    """Make a row's images, batch by batch, and return their features (N, D) by each network."""

    def pixels(indices: range) -> Tensor:
        return request.images(pipeline, indices).images

    return features_of(request.num_images, request.batch_size, pixels, networks, label="generated")


@torch.no_grad()
def reconstruct(pipeline: LeDiFlowPipeline, y: Tensor, request: Request) -> Tensor:
    """Return images y (N, C, H, W) in [-1, 1] after encoder, prior and flow: z is the mean of q(z|y).

    A model with classes is asked without one.
    """
    ends, where = [], pipeline.device
    for start in range(0, len(y), request.batch_size):
        batch = y[start : start + request.batch_size].to(where)
        indices = range(start, start + len(batch))
        noise = pipeline.noise(batch.shape[1:], indices, request.seed, "x")
        with torch.autocast(where.type, dtype=DTYPES[request.dtype], enabled=request.dtype != "fp32"):
            z = pipeline.encode(batch).mean
            x = pipeline.source(z, noise, request.temperature)
            solution = pipeline.carry(
                x, z, steps=request.steps, solver=request.solver, autoguidance=request.autoguidance
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


def timings(
    rows: Sequence[tuple[ImagePipeline, Request]],
    *,
    repeats: int = 3,
    output_type: str = "pt",
    split: bool = True,
) -> list[dict[str, Any]]:
    """Return evaluations and milliseconds for one image of a batch, whole and by network, of several rows.

    The rows take turns, so that the machine's drift meets all alike.

    Args:
        rows: pipelines on one device, and requests of one batch size.
        repeats: timed requests of each row, after one that is not timed; the median counts.
        output_type: "pt", or "latent" to leave a codec out.
        split: also tell the networks apart, and "other", which is what no network takes: noise and the
            solver's arithmetic.
    """
    device, batch = rows[0][0].device, rows[0][1].batch_size
    nfe: list[dict[str, int]] = [{} for _ in rows]
    total = len(rows) * (1 + repeats + (SPLIT if split else 0))
    done = itertools.count(1)
    found = []
    with Progress("timing", 0, total) as progress:

        def call(row: int) -> None:
            pipeline, request = rows[row]
            nfe[row] = request.images(pipeline, range(batch), output_type).nfe
            progress.update(next(done), "batches")

        calls = {str(row): partial(call, row) for row in range(len(rows))}
        wholes = compare(calls, images=batch, repeats=repeats, device=device)
        for row, (name, whole) in enumerate(wholes.items()):
            parts: dict[str, float] = {}
            if split:
                networks = network_parts(rows[row][0])
                shares = part_shares(calls[name], networks, repeats=SPLIT, device=device)
                parts = {
                    part: share * whole.ms_per_image for part, share in shares.items() if part in nfe[row]
                }
                parts["other"] = whole.ms_per_image - sum(parts.values())
            found.append(
                {
                    "nfe": nfe[row],
                    "ms_per_image": {"total": whole.ms_per_image, **parts},
                    "images_per_second": whole.images_per_second,
                    "timing_spread": whole.spread,
                }
            )
    return found


def network_parts(pipeline: ImagePipeline) -> dict[str, tuple[Any, str]]:
    """Return the networks of a request by the names that its NFE has, each with the method that runs it."""
    parts: dict[str, tuple[Any, str]] = {"flow": (pipeline.flow, _runs(pipeline.flow))}
    if isinstance(pipeline, LeDiFlowPipeline):
        sampler = pipeline.sampler
        parts |= {"sampler": (sampler, _runs(sampler)), "decoder": (pipeline.auxiliary, "decode")}
    if getattr(pipeline, "vae", None) is not None:
        parts["codec"] = (pipeline.vae, "decode")
    return parts


def _runs(network: torch.nn.Module) -> str:
    # a network compiled in place is not run through `forward`
    return "forward" if network._compiled_call_impl is None else "_compiled_call_impl"


def in_pixels(pipeline: LeDiFlowPipeline) -> bool:
    """Whether the model works on pixels, not on a codec's latents."""
    return pipeline.config.codec_space is None


def notes_of(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Call a function; return its result and the texts of the warnings it gave for the user."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
