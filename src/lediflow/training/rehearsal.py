"""`lediflow train --dry-run`: a few steps of every stage, to tell what the whole training takes."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from lediflow.data.batches import batches
from lediflow.devices import check_device, load_words
from lediflow.sources import BatchNoise
from lediflow.training.builders import OBJECTIVES, build_network, build_stage
from lediflow.training.clusters import settle_clusters
from lediflow.training.config import Config, check_sections
from lediflow.training.couplings import Context, Posteriors
from lediflow.training.early import check_early, is_early
from lediflow.training.inputs import describe, open_data
from lediflow.training.meter import memory_gb
from lediflow.training.objectives import Objective
from lediflow.training.processes import make_accelerator
from lediflow.training.stages import STAGES
from lediflow.training.teacher import check_strengths
from lediflow.training.texts import made_up_texts, settle_text

STEPS = 2  # timed, after one that is not


@dataclass(frozen=True)
class StageEstimate:
    """What one stage will take.

    Attributes:
        stage: its name.
        parameters: of its network.
        steps: of its training.
        batch_size: images of a step.
        ms_per_step: measured here.
        memory_gb: in use after its steps, of this process or of the GPU.
    """

    stage: str
    parameters: int
    steps: int
    batch_size: int
    ms_per_step: float
    memory_gb: float

    @property
    def seconds(self) -> float:
        """Of the whole stage, without previews and checkpoints."""
        return self.steps * self.ms_per_step / 1000


def rehearse(
    config: Config, stages: Iterable[str] | None = None, device: str | None = None
) -> dict[str, Any]:
    """Open the data, build every network, and time a few steps of each stage; nothing is written.

    What a stage relies on is played by networks that are not trained, which takes the same time. Compiling is
    left out.

    Returns:
        {"data": in words, "batch": shape, range and classes of the first batch, "busy": in words, if other
        work slows this, "stages": a list of `StageEstimate`}.

    Raises:
        UserError: whatever the training itself would refuse before its first step.
    """
    check_sections(config, config.chosen(stages))
    check_strengths(config, config.chosen(stages))
    check_early(config, config.chosen(stages))
    accelerator = make_accelerator(config.training, device)
    data, where = open_data(config), check_device(device)
    busy = load_words()
    config, encoder = settle_text(settle_clusters(config, data), accelerator)
    context = Context(config, data, accelerator.device, lambda name: build_network(STAGES[name], config))
    if encoder is not None:
        context.encoded = made_up_texts(config, len(data.texts), accelerator.device)
    estimates, seen = [], None
    for spec in config.chosen(stages):
        if not OBJECTIVES[spec.objective].by_gradients:
            continue  # it takes seconds
        if is_early(spec, config):
            continue  # it comes along
        if "auxiliary" in config.uses(spec) and "posteriors" not in context.__dict__:
            # a whole set need not be encoded to time a step
            context.posteriors = Posteriors(context.network("auxiliary"), data, where, keep=False)
        stage = build_stage(spec.name, context)
        stage.rehearse()
        batch = _first_batch(context, stage.settings.batch_size)
        seen = seen or _seen(batch)
        ms = _time_steps(stage, batch, accelerator)
        parameters = sum(p.numel() for p in stage.network.parameters())
        size, steps = stage.settings.batch_size, stage.settings.steps
        estimates.append(StageEstimate(spec.name, parameters, steps, size, ms, memory_gb(accelerator.device)))
    if seen is None:
        seen = _seen(_first_batch(context, 1))
    return {"data": describe(data, config), "batch": seen, "busy": busy, "stages": estimates}


def _first_batch(context: Context, size: int) -> dict[str, Any]:
    batch = next(batches(context.data, batch_size=size, seed=0, stop=1))
    return {name: x.to(context.device) for name, x in batch.items() if isinstance(x, torch.Tensor)}


def _time_steps(stage: Objective, batch: dict[str, Any], accelerator: Any) -> float:
    """Return milliseconds of a step: forward, backward, optimiser."""
    settings, device = stage.settings, stage.context.device
    groups = stage.network.parameter_groups(settings.learning_rate, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=settings.betas)
    stage.network.train()
    taken = []
    for step in range(1 + STEPS):
        noise = BatchNoise(
            step,
            batch_size=settings.batch_size,
            positions=range(settings.batch_size),
            device=device,
        )
        began = time.perf_counter()
        with accelerator.autocast():
            loss, _ = stage.learn(stage.network, batch, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        taken.append(time.perf_counter() - began)
    return 1000 * sum(taken[1:]) / STEPS


def _seen(batch: dict[str, Any]) -> dict[str, Any]:
    image = batch["image"]
    return {
        "shape": list(image.shape),
        "range": [round(image.min().item(), 3), round(image.max().item(), 3)],
        "classes": sorted(set(batch["label"].tolist())),
    }


def report_text(report: dict[str, Any]) -> str:
    """Return a report of `rehearse` as text."""
    batch = report["batch"]
    lines = [
        report["data"],
        f"first batch: {' x '.join(map(str, batch['shape']))}, values {batch['range'][0]} to "
        f"{batch['range'][1]}, classes {', '.join(map(str, batch['classes'][:12]))}",
        "",
    ]
    if not report["stages"]:
        return "\n".join([*lines, "nothing of this is trained step by step; it takes seconds at most"])
    lines.append("stage                parameters    steps  batch   ms/step  images/s       time")
    for e in report["stages"]:
        spent = timedelta(seconds=round(e.seconds))
        lines.append(
            f"{e.stage:18} {e.parameters:12,} {e.steps:8,} {e.batch_size:6} {e.ms_per_step:9.1f} "
            f"{1000 * e.batch_size / e.ms_per_step:9.0f} {spent!s:>10}"
        )
    total = timedelta(seconds=round(sum(e.seconds for e in report["stages"])))
    most = max(e.memory_gb for e in report["stages"])
    lines.append(f"\nabout {total} in all, previews and checkpoints apart; memory {most:.1f} GB")
    if report["busy"]:
        lines.append(f"{report['busy']}: without that it takes less")
    return "\n".join(lines)
