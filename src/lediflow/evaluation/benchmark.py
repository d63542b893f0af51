"""How fast a model is: per network, per image, per training step, beside this machine's own matmul rate.

Weights need not be trained: time depends on sizes alone. Plain flow matching is timed with the flow's network
without z, beside LeDiFlow, in the same run and in turns.
"""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lediflow.codecs import Codec
from lediflow.evaluation.flops import count_flops, matmul_rate, velocity_flops
from lediflow.evaluation.latency import compare, measure
from lediflow.flow import matching_loss, phi
from lediflow.networks.attention import choose_backend
from lediflow.networks.hourglass import level_kernels, pair
from lediflow.networks.model import Compile, Network
from lediflow.networks.velocity import VelocityTransformer
from lediflow.pipelines.base import load_pipeline
from lediflow.pipelines.flow_matching import FlowMatchingPipeline
from lediflow.pipelines.lediflow import LeDiFlowPipeline
from lediflow.precision import DTYPES, settle_precision

# Table 1 of the paper: solver, steps of plain flow matching, steps of LeDiFlow's flow and latent sampler
TABLE_1 = (("midpoint", 8, 2, 4), ("heun3", 8, 1, 2))
FM_SOLVER = "midpoint"  # of plain flow matching, that one evaluation of an average velocity stands beside


def benchmark(
    pipeline: LeDiFlowPipeline,
    *,
    device: torch.device,
    codec: Codec | None = None,
    dtype: str = "auto",
    batch_size: int = 8,
    repeats: int = 3,
    compile: Compile | Literal["pipeline"] = "none",
    training: bool = True,
    gradient_checkpointing: bool = False,
) -> dict[str, Any]:
    """Time the networks of a pipeline, sampling as in Table 1 of the paper, and a training step of the flow.

    Args:
        pipeline: the three networks, trained or not.
        device: where to run.
        codec: timed too, as a network of its own; the rows of sampling leave it out.
        dtype: "fp32", "bf16" or "fp16", of the weights in sampling, of autocast in training; "auto" is bf16
            where the device multiplies it, else fp32.
        batch_size: images at a time.
        repeats: timed repetitions, after one that is not timed; the median counts.
        compile: "none", "blocks" or "model", as in the training config, or "pipeline" for what the method
            `compile` of pipelines does; the training step is then of a compiled "model".
        training: also time a training step of the flow.
        gradient_checkpointing: of that training step.

    Returns:
        A dictionary that can be written as JSON: `matmul_gflops`, `attention` (backend by grid), `networks`
        (parameters, and GFLOP, ms and share of the matmul rate of one evaluation for one image), `sampling`
        (a record for each row of Table 1, and one of a single step where the flow has an average velocity,
        with ms per image split by network), `speedup` by solver, that of "mean" against plain flow matching
        at 8 midpoint steps, `training`.

    Raises:
        UserError: an unknown dtype.
    """
    settled = settle_precision(dtype, device)
    kind = DTYPES[settled] or torch.float32
    rate = matmul_rate(device, kind)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": settled,
        "batch_size": batch_size,
        "compile": compile,
        "matmul_gflops": round(rate / 1e9, 1),
        "attention": attention_backends(pipeline.flow, device),
    }
    untouched = copy.deepcopy(pipeline.flow) if training else None
    models = {
        "flow matching": baseline_of(pipeline).to(device, kind),
        "LeDiFlow": pipeline.to(device, kind),
    }
    for model in models.values():
        model.set_progress_bar_config(disable=True)
        if compile == "pipeline":
            model.compile()
            continue
        for network in model.components.values():
            if isinstance(network, Network):
                network.compile_as(compile)
    parts = _parts(pipeline, codec, batch_size, device, kind)
    times = compare(parts, images=batch_size, repeats=repeats, device=device)
    report["networks"] = {
        name: _network_facts(name, pipeline, codec, parts[name], times[name].ms_per_image, batch_size, rate)
        for name in parts
    }
    per_evaluation = {name: facts["ms_per_image"] for name, facts in report["networks"].items()}
    report["sampling"] = _sampling(models, batch_size, repeats, device, per_evaluation)
    report["speedup"] = _speedups(report["sampling"])
    if untouched is not None:
        report["training"] = _training(
            untouched,
            device,
            kind,
            batch_size,
            repeats,
            "model" if compile == "pipeline" else compile,
            gradient_checkpointing,
            rate,
        )
    return report


def pipeline_of(
    model: str, overrides: list[str] | None = None, *, average_velocity: bool = False
) -> LeDiFlowPipeline:
    """Return the pipeline of a MODEL (run folder, saved pipeline, Hub id), or an untrained one of a preset.

    Args:
        model: MODEL, a preset's name or a config file.
        overrides: settings `a.b=value`, for a preset or config file.
        average_velocity: of a preset's flow and sampler, also where its `training.stages` do not give it.

    Raises:
        UserError: neither; or settings for a trained model; or a model without a learned prior.
    """
    from lediflow.errors import UserError, nearest
    from lediflow.training.builders import build_auxiliary, build_flow, build_sampler
    from lediflow.training.config import load_config, preset_names

    if model in preset_names() or Path(model).suffix in (".yaml", ".yml"):
        config = load_config(model, overrides)
        stages = set(config.training.stages)
        flow_has_it = average_velocity or bool(stages & {"meanflow", "distill"})
        sampler_has_it = average_velocity or "sampler-meanflow" in stages
        return LeDiFlowPipeline(
            auxiliary=build_auxiliary(config).eval(),
            flow=build_flow(config, average_velocity=flow_has_it).eval(),
            sampler=build_sampler(config, average_velocity=sampler_has_it).eval(),
        )
    if overrides or average_velocity:
        option = "--set" if overrides else "--average-velocity"
        raise UserError(f"{option} changes a preset or a config file; a trained model is what it is")
    if "/" not in model and not Path(model).exists():
        raise UserError(
            f"no model or preset {model!r}{nearest(model, preset_names())}; see `lediflow presets`"
        )
    pipeline = load_pipeline(model)
    if not isinstance(pipeline, LeDiFlowPipeline):
        raise UserError(f"{model} is plain flow matching; give a LeDiFlow model, which is timed beside it")
    return pipeline


def baseline_of(pipeline: LeDiFlowPipeline) -> FlowMatchingPipeline:
    """Return plain flow matching with the flow's network without z and average velocity, untrained."""
    config = {k: v for k, v in pipeline.flow.config.items() if not k.startswith("_")}
    flow = VelocityTransformer(**config | {"latent_channels": 0, "average_velocity": False}).eval()
    return FlowMatchingPipeline(flow=flow, latent_space=pipeline.config.latent_space)


def attention_backends(network: VelocityTransformer, device: torch.device) -> dict[str, str]:
    """Return what computes the attention of each level, by its grid."""
    c = network.config
    h, w = (side // c.patch_size for side in pair(c.sample_size))
    kernels = level_kernels(len(c.widths), c.kernel_size, c.global_levels)
    return {
        f"{h >> level}x{w >> level}": choose_backend((h >> level, w >> level), kernel, device)
        for level, kernel in enumerate(kernels)
    }


# The parts


def _inputs(network: VelocityTransformer, batch: int, device: torch.device, dtype: torch.dtype) -> list[Any]:
    """Arguments of one evaluation: x, t, z or None, class labels or None."""
    c = network.config
    x = torch.randn(batch, c.in_channels, *pair(c.sample_size), device=device, dtype=dtype)
    t = torch.tensor(0.5, device=device)
    z = None
    if c.latent_channels:
        z = torch.randn(batch, *network.latent_shape, device=device, dtype=dtype)
    labels = torch.zeros(batch, dtype=torch.long, device=device) if c.num_classes else None
    return [x, t, z, labels]


def _parts(
    pipeline: LeDiFlowPipeline, codec: Codec | None, batch: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    """One evaluation of each network, by name."""
    flow_inputs = _inputs(pipeline.flow, batch, device, dtype)
    sampler_inputs = _inputs(pipeline.sampler, batch, device, dtype)
    z = torch.randn(batch, *pipeline.auxiliary.latent_shape, device=device, dtype=dtype)

    def quiet(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        return lambda: torch.no_grad()(fn)(*args)

    parts = {
        "sampler": quiet(pipeline.sampler, *sampler_inputs),
        "decoder": quiet(pipeline.auxiliary.decode, z),
        "flow": quiet(pipeline.flow, *flow_inputs),
    }
    if codec is not None:
        codec.model.to(device, dtype)
        parts["codec"] = quiet(codec.decode, flow_inputs[0])
    return parts


def _network_facts(
    name: str,
    pipeline: LeDiFlowPipeline,
    codec: Codec | None,
    part: Callable[[], Any],
    ms: float,
    batch: int,
    rate: float,
) -> dict[str, Any]:
    decoders = {"decoder": pipeline.auxiliary, "codec": codec.model if codec else None}
    network = decoders.get(name) or getattr(pipeline, name)
    flops = count_flops(part) / batch if name in decoders else velocity_flops(network)
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "gflop": round(flops / 1e9, 3),
        "ms_per_image": round(ms, 3),
        "share_of_matmul": round(flops / (ms / 1000) / rate, 3),
    }


# Sampling


def _sampling(
    models: dict[str, Any], batch: int, repeats: int, device: torch.device, per_evaluation: dict[str, float]
) -> list[dict[str, Any]]:
    rows: list[tuple[str, dict[str, Any]]] = []
    for solver, fm_steps, steps, latent_steps in TABLE_1:
        rows.append(("flow matching", {"solver": solver, "steps": fm_steps}))
        latent = {"latent_solver": solver, "latent_steps": latent_steps}
        rows.append(("LeDiFlow", {"solver": solver, "steps": steps, **latent}))
    if models["LeDiFlow"].flow.average_velocity:
        rows.append(("LeDiFlow", models["LeDiFlow"].settle(solver="mean")))
    calls, evaluations = {}, {}

    def call(key: str, model: str, options: dict[str, Any]) -> None:
        kind = "latent" if models[model].config.latent_space else "pt"
        out = models[model](batch, batch_size=batch, output_type=kind, **options)
        evaluations[key] = out.nfe

    for model, options in rows:
        key = f"{model} {options['solver']}"
        calls[key] = lambda key=key, model=model, options=options: call(key, model, options)
    times = compare(calls, images=batch, repeats=repeats, device=device)
    return [
        {
            "model": model,
            **options,
            "nfe": evaluations[key],
            "ms_per_image": round(times[key].ms_per_image, 3),
            "images_per_second": round(times[key].images_per_second, 3),
            "spread": round(times[key].spread, 3),
            "ms": {name: round(count * per_evaluation[name], 3) for name, count in evaluations[key].items()},
        }
        for (model, options), key in zip(rows, calls, strict=True)
    ]


def _speedups(sampling: list[dict[str, Any]]) -> dict[str, float]:
    ms = {(row["model"], row["solver"]): row["ms_per_image"] for row in sampling}
    return {
        solver: round(ms["flow matching", FM_SOLVER if solver == "mean" else solver] / taken, 2)
        for (model, solver), taken in ms.items()
        if model == "LeDiFlow"
    }


# Training


def _training(
    network: VelocityTransformer,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    repeats: int,
    compile: Compile,
    gradient_checkpointing: bool,
    rate: float,
) -> dict[str, Any]:
    """Time forward, backward and AdamW of the flow's network with fp32 weights under autocast."""
    network = network.to(device).train()
    if gradient_checkpointing:
        network.enable_gradient_checkpointing()
    network.compile_as(compile)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=device.type in ("cpu", "cuda"))
    y, _, z, labels = _inputs(network, batch, device, torch.float32)
    x, t = torch.randn_like(y), torch.rand(batch, device=device)

    def step() -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = matching_loss(network(phi(x, y, t), t, z, labels), x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    taken = measure(step, images=batch, repeats=repeats, device=device)
    with peak_memory(device) as peak:
        step()
    return {
        "ms_per_step": round(taken.ms_per_image * batch, 1),
        "images_per_second": round(taken.images_per_second, 2),
        # forward once, backward twice; what checkpointing computes again is no useful work
        "share_of_matmul": round(3 * velocity_flops(network) * taken.images_per_second / rate, 3),
        "gradient_checkpointing": gradient_checkpointing,
        "peak_memory_gb": round(peak[0] / 1e9, 2),
    }


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Yield a list that holds the peak of memory in use, in bytes, when the block ends.

    On CUDA it is the allocator's peak. On a CPU it is the process' resident memory, looked at every
    millisecond, everything that was there before included.
    """
    peak = [0.0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = float(torch.cuda.max_memory_allocated(device))
        return
    import psutil

    gc.collect()
    process, done = psutil.Process(), threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
