"""The one loop that trains every stage: precision, EMA, warm-up, clipping, logs, previews, checkpoints.

A step depends on (seed, stage, step) alone: its images and its noise come from generators made for it. So a
run that stopped and went on is the run that never stopped.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from torch import Tensor

from lediflow.data.images import batches
from lediflow.errors import UserError
from lediflow.evaluation.report import image_grid
from lediflow.files import write_text, written_whole
from lediflow.networks.hourglass import parameter_groups
from lediflow.sources import derive_seed
from lediflow.training import checkpoint
from lediflow.training.config import Config, StageConfig
from lediflow.training.progress import Progress
from lediflow.training.stages import Stage


class Interrupted(Exception):
    """The user or the system asked the process to stop; the state was saved."""


def make_accelerator(config: Config, device: str | None, logs: Path) -> Accelerator:
    """Return the Accelerate engine for the config's precision.

    Args:
        config: of the run.
        device: "cpu", "cuda" or "mps"; None for the best there is.
        logs: folder of TensorBoard's files.

    Raises:
        UserError: a device that is unknown or not there.
    """
    check_device(device)
    # one process may train several runs, in other precisions
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        mixed_precision="bf16" if config.training.precision == "bf16" else "no",
        cpu=device == "cpu",
        log_with="tensorboard",
        project_dir=logs,
    )
    accelerator.init_trackers("logs")
    return accelerator


def check_device(device: str | None) -> torch.device:
    """Return the torch device of a name, the best there is for None.

    Raises:
        UserError: the name is unknown, or this machine has no such device.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device is None:
        return torch.device("cuda" if there["cuda"] else "mps" if there["mps"] else "cpu")
    kind = device.partition(":")[0]
    if kind not in there:
        raise UserError(f"unknown device {device!r}; choose cpu, cuda or mps")
    if not there[kind]:
        raise UserError(
            f"this machine has no {kind} device that torch can use; leave --device out or use cpu"
        )
    return torch.device(device)


def fit(stage: Stage, folder: Path, accelerator: Accelerator, *, state: dict[str, Any], resume: bool) -> Path:
    """Train `stage` to its last step and return the folder of its last checkpoint.

    Args:
        stage: what to learn.
        folder: of the stage in the run folder.
        accelerator: from `make_accelerator`.
        state: what a checkpoint must agree on to be continued, kept in its state.json.
        resume: go on from the last checkpoint in `folder`, if there is one.

    Raises:
        UserError: the loss is not finite, a checkpoint is damaged or does not fit, the disk is full.
        Interrupted: after SIGINT or SIGTERM, with the state saved.
    """
    return _Fit(stage, folder, accelerator, state).run(resume)


class _Fit:
    def __init__(self, stage: Stage, folder: Path, accelerator: Accelerator, state: dict[str, Any]):
        self.stage, self.folder, self.accelerator, self.state = stage, folder, accelerator, state
        self.settings, self.training = stage.settings, stage.config.training
        self.network = stage.network
        groups = list(parameter_groups(self.network, self.settings.learning_rate, self.settings.weight_decay))
        self.base_rates = [group["lr"] for group in groups]
        optimizer = torch.optim.AdamW(
            groups, betas=self.settings.betas, fused=accelerator.device.type in ("cpu", "cuda")
        )
        if self.training.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self.network.compile_as(self.training.compile)
        self.model, self.optimizer = accelerator.prepare(self.network, optimizer)
        self.ema = EMAModel(
            self.network.parameters(), decay=self.settings.ema_decay, use_ema_warmup=True, foreach=True
        )

    def run(self, resume: bool) -> Path:
        start = self._resume() if resume else 0
        last = self.folder / "checkpoints" / f"step-{self.settings.steps}"
        if start >= self.settings.steps:
            return self.folder / "checkpoints" / f"step-{start}"
        (self.folder / "previews").mkdir(parents=True, exist_ok=True)
        self._drop_metrics_after(start)
        stream = batches(
            self.stage.data,
            batch_size=self.settings.batch_size,
            seed=derive_seed(self.training.seed, self.stage.name, "data"),
            start=start,
            stop=self.settings.steps,
            workers=self.stage.config.data.workers,
        )
        with (
            stop_signals() as stopped,
            open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as log,
            Progress(self.stage.name, start, self.settings.steps) as progress,
        ):
            self._loop(start, stream, stopped, log, progress)
        return last

    def _loop(
        self, start: int, stream: Iterator[dict[str, Tensor]], stopped, log, progress: Progress
    ) -> None:
        every, settings = self.training, self.settings
        losses: list[Tensor] = []
        began, seen = time.perf_counter(), 0
        for step, batch in enumerate(stream, start=start + 1):
            loss, metrics, norm = self._step(step, batch)
            losses.append(loss)
            seen += len(batch["index"])
            if step % every.log_every == 0 or step == settings.steps:
                mean = torch.stack(losses).mean().item()
                rate = seen / (time.perf_counter() - began)
                self._log(log, step, mean, norm, rate, metrics)
                progress.update(step, mean, rate)
                losses.clear()
                began, seen = time.perf_counter(), 0
            done = step == settings.steps
            if done:
                with self._averaged_weights(), torch.no_grad(), self.accelerator.autocast():
                    self.stage.finish()
            if done or stopped or step % every.checkpoint_every == 0:
                self._save(step)
            if done or step % every.preview_every == 0:
                self._preview(step)
            if stopped and not done:
                raise Interrupted(f"stopped at step {step} of stage {self.stage.name}; everything is saved")

    def _step(self, step: int, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        device = self.accelerator.device
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor)}
        generator = torch.Generator(device).manual_seed(
            derive_seed(self.training.seed, self.stage.name, "noise", step)
        )
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * rate_factor(step, self.settings)
        self.model.train()
        with self.accelerator.autocast():
            loss, metrics = self.stage.loss(self.model, batch, generator)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.network.parameters(), self.settings.clip)
        if not math.isfinite(norm):
            name = self.stage.name
            raise UserError(
                f"stage {name}, step {step}: the loss ({loss.item():g}) or its gradient is not finite. The "
                f"last checkpoint is intact. Lower training.{name}.learning_rate, raise its warmup_steps, "
                "or try training.precision=fp32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())
        return loss.detach(), metrics, norm

    def _log(
        self, log, step: int, loss: float, norm: Tensor, rate: float, metrics: dict[str, Tensor]
    ) -> None:
        record = {
            "loss": loss,
            "grad_norm": float(norm),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_per_second": round(rate, 1),
            **{name: float(value) for name, value in metrics.items()},
        }
        log.write(json.dumps({"step": step, **record}) + "\n")
        log.flush()
        self.accelerator.log({f"{self.stage.name}/{k}": v for k, v in record.items()}, step=step)

    def _drop_metrics_after(self, start: int) -> None:
        """Forget lines of steps that will be made again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
            write_text(path, "".join(kept))

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        parameters = list(self.network.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        self.network.eval()
        try:
            yield
        finally:
            self.ema.restore(parameters)
            self.network.train()

    def _preview(self, step: int) -> None:
        with self._averaged_weights(), torch.no_grad(), self.accelerator.autocast():
            rows = [self.stage.data.show(row) for row in self.stage.preview()]
        scale = max(1, 64 // rows[0].shape[-1])
        with written_whole(self.folder / "previews" / f"step-{step:06d}.png") as path:
            image_grid(rows, scale=scale).save(path)

    def _save(self, step: int) -> None:
        names = [name for name, _ in self.network.named_parameters()]
        buffers = dict(self.network.named_buffers())
        averaged = dict(zip(names, self.ema.shadow_params, strict=True)) | buffers
        checkpoint.save(
            self.folder / "checkpoints",
            step,
            model=self.network.state_dict(),
            ema=averaged,
            optimizer=self.optimizer,
            state={**self.state, "ema_steps": self.ema.optimization_step},
            keep=self.training.keep_checkpoints,
        )

    def _resume(self) -> int:
        steps = checkpoint.steps_on_disk(self.folder / "checkpoints")
        if not steps:
            return 0
        folder = self.folder / "checkpoints" / f"step-{steps[-1]}"
        saved = checkpoint.load_state(folder)
        for key, value in self.state.items():
            if saved.get(key) != value:
                raise UserError(
                    f"{folder} was trained with another {key} ({saved.get(key)}, now {value}); use "
                    f"--no-resume to train stage {self.stage.name} again"
                )
        if steps[-1] >= self.settings.steps:
            return steps[-1]
        self.network.load_state_dict(checkpoint.load_tensors(folder, "model.safetensors"))
        averaged = checkpoint.load_tensors(folder, "ema.safetensors")
        for (name, _), shadow in zip(self.network.named_parameters(), self.ema.shadow_params, strict=True):
            shadow.copy_(averaged[name])
        self.ema.optimization_step = saved["ema_steps"]
        checkpoint.load_optimizer(folder, self.optimizer)
        return steps[-1]


def rate_factor(step: int, settings: StageConfig) -> float:
    """Return the share of the learning rate at `step` (from 1): linear warm-up, then constant or cosine."""
    warmup = min(1.0, step / max(1, settings.warmup_steps))
    if settings.schedule == "constant":
        return warmup
    progress = max(0, step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return warmup * 0.5 * (1 + math.cos(math.pi * progress))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying, so that the loop can save and leave."""
    received: list[int] = []
    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, lambda n, _: received.append(n))
    except ValueError:  # not the main thread: the caller handles signals
        pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
