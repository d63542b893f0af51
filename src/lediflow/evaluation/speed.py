"""How fast a model is on this machine: requests as `lediflow sample` makes them, split by network; memory.

Weights need not be trained: time depends on sizes alone. Scripts in benchmarks/ time Table 1 of the paper,
training steps, and shares of the machine's matmul rate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from lediflow.choices import Compile
from lediflow.codecs import Codec
from lediflow.devices import DTYPES, settle_precision
from lediflow.errors import UserError, nearest
from lediflow.evaluation.latency import compare, peak_memory
from lediflow.evaluation.measure import timings
from lediflow.evaluation.request import Request
from lediflow.networks.attention import choose_backend
from lediflow.networks.hourglass import level_kernels, pair
from lediflow.networks.model import Network
from lediflow.networks.velocity import VelocityTransformer
from lediflow.pipelines.base import ImagePipeline
from lediflow.pipelines.lediflow import LeDiFlowPipeline
from lediflow.pipelines.load import load_pipeline
from lediflow.training.builders import build_auxiliary, build_flow, build_sampler, is_refined
from lediflow.training.config import load_config
from lediflow.training.config_files import preset_names

# the networks of a pipeline as its NFE names them, and the component that holds the weights
COMPONENTS = {"sampler": "sampler", "decoder": "auxiliary", "flow": "flow"}


def benchmark(
    pipeline: ImagePipeline,
    *,
    device: torch.device,
    solver: str | None = None,
    steps: int | None = None,
    latent_solver: str | None = None,
    latent_steps: int | None = None,
    codec: Codec | None = None,
    dtype: str = "auto",
    batch_size: int = 8,
    repeats: int = 3,
    compile: Compile | Literal["pipeline"] = "none",
) -> dict[str, Any]:
    """Time requests of a pipeline, trained or not.

    Args:
        pipeline: the model.
        device: where to run.
        solver: of the flow; this and the next three as for the pipeline's call, also where they are None.
        steps: of the flow.
        latent_solver: of the latent sampler.
        latent_steps: of the latent sampler.
        codec: timed too, one decoding for itself; the requests leave a codec out.
        dtype: "fp32", "bf16" or "fp16", of the weights; "auto" is bf16 where the device multiplies it.
        batch_size: images at a time.
        repeats: timed repetitions, after one that is not timed; the median counts.
        compile: "none", "blocks" or "model", as in the training config, or "pipeline" for what the method
            `compile` of pipelines does, in which the networks cannot be told apart.

    Returns:
        A dictionary that can be written as JSON: device, threads, torch, dtype, batch_size, compile;
        `attention` (backend by grid); solvers and steps; `nfe`; `ms_per_image` ("total", by network and
        "other"); `images_per_second`, `spread`, `peak_memory_gb`; `networks`, the parameters of each;
        `codec`, its parameters and milliseconds.

    Raises:
        UserError: an unknown dtype, solver or step count, or "mean" without an average velocity.
    """
    settled = settle_precision(dtype, device)
    kind = DTYPES[settled] or torch.float32
    options = pipeline.settle(
        solver=solver, steps=steps, latent_solver=latent_solver, latent_steps=latent_steps
    )
    request = Request(**options, num_images=batch_size, seed=0, batch_size=batch_size, dtype="fp32")
    pipeline.to(device, kind).set_progress_bar_config(disable=True)
    if compile == "pipeline":
        pipeline.compile()
    else:
        for network in pipeline.components.values():
            if isinstance(network, Network):
                network.compile_as(compile)
    kept = "latent" if pipeline.config.codec_space else "pt"
    (taken,) = timings([(pipeline, request)], repeats=repeats, output_type=kept, split=compile != "pipeline")
    with peak_memory(device) as peak:
        request.images(pipeline, range(batch_size), kept)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": settled,
        "batch_size": batch_size,
        "compile": compile,
        "attention": attention_backends(pipeline.flow, device),
        **options,
        "nfe": taken["nfe"],
        "ms_per_image": {name: round(ms, 3) for name, ms in taken["ms_per_image"].items()},
        "images_per_second": round(taken["images_per_second"], 3),
        "spread": round(taken["timing_spread"], 3),
        "peak_memory_gb": round(peak[0] / 1e9, 2),
        "networks": {name: _parameters(getattr(pipeline, COMPONENTS[name])) for name in taken["nfe"]},
    }
    if codec is not None:
        codec.model.to(device, kind)
        latents = torch.zeros(batch_size, *pipeline.sample_shape, device=device, dtype=kind)
        calls = {"codec": lambda: torch.no_grad()(codec.decode)(latents)}
        one = compare(calls, images=batch_size, repeats=repeats, device=device)["codec"]
        report["codec"] = {"parameters": _parameters(codec.model), "ms_per_image": round(one.ms_per_image, 3)}
    return report


def pipeline_of(
    model: str, overrides: list[str] | None = None, *, average_velocity: bool = False
) -> ImagePipeline:
    """Return the pipeline of a MODEL (run folder, saved pipeline, Hub id), or an untrained one of a preset.

    Args:
        model: MODEL, a preset's name or a config file.
        overrides: settings `a.b=value`, for a preset or config file.
        average_velocity: of a preset's flow and sampler, also where its `training.stages` do not give it.

    Raises:
        UserError: neither; or settings for a trained model.
    """
    if model in preset_names() or Path(model).suffix in (".yaml", ".yml"):
        config = load_config(model, overrides)
        flow, sampler = (average_velocity or is_refined(config, name) for name in ("flow", "sampler"))
        return LeDiFlowPipeline(
            auxiliary=build_auxiliary(config).eval(),
            flow=build_flow(config, average_velocity=flow).eval(),
            sampler=build_sampler(config, average_velocity=sampler).eval(),
        )
    if overrides or average_velocity:
        option = "--set" if overrides else "--average-velocity"
        raise UserError(f"{option} changes a preset or a config file; a trained model is what it is")
    if "/" not in model and not Path(model).exists():
        raise UserError(
            f"no model or preset {model!r}{nearest(model, preset_names())}; see `lediflow presets`"
        )
    return load_pipeline(model)


def attention_backends(network: VelocityTransformer, device: torch.device) -> dict[str, str]:
    """Return what computes the attention of each level, by its grid."""
    c = network.config
    h, w = (side // c.patch_size for side in pair(c.sample_size))
    kernels = level_kernels(len(c.widths), c.kernel_size, c.global_levels)
    return {
        f"{h >> level}x{w >> level}": choose_backend((h >> level, w >> level), kernel, device)
        for level, kernel in enumerate(kernels)
    }


def _parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
