"""The one loop that trains every stage: precision, averages, warm-up, clipping, logs, previews, checkpoints.

A step depends on (seed, stage, step) alone: its images and its noise come from generators made for it. So a
run that was interrupted and resumed is the run that never stopped, and several processes make the steps of
one.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.exc
from accelerate import Accelerator
from torch import Tensor

from lediflow.data.batches import batches
from lediflow.errors import UserError
from lediflow.files import clear_unfinished, explained, read_records, write_text, written_whole
from lediflow.pictures import image_grid
from lediflow.progress import Progress
from lediflow.sources import BatchNoise, derive_seed
from lediflow.training import checkpoint
from lediflow.training.config import Config
from lediflow.training.early import EarlyAverage
from lediflow.training.guard import PATIENCE, ROLLBACKS, Diverged
from lediflow.training.meter import Meter, memory_gb
from lediflow.training.objectives import Objective
from lediflow.training.processes import gradients, local, on_main, whole
from lediflow.training.settings import StageConfig
from lediflow.training.signals import stop_signals
from lediflow.training.stages import StageSpec
from lediflow.training.state import TrainingState

# what compiling raises; some of its failures are plain RuntimeErrors
COMPILER_ERRORS = (torch._dynamo.exc.TorchDynamoException, RuntimeError)
FALLING = ("cosine", "linear")  # schedules that end at a learning rate of 0


class Interrupted(Exception):
    """The user or the system asked the process to stop; the state was saved."""


def check_batches(config: Config, stages: list[StageSpec], processes: int) -> None:
    """Refuse a batch that cannot be cut into equal parts.

    Raises:
        UserError: naming the stage's batch size and its divisor.
    """
    parts = processes * config.training.accumulate
    for spec in stages:
        size = getattr(config.stage(spec.name), "batch_size", 0)
        if size % parts:
            raise UserError(
                f"training.{spec.section}.batch_size {size} is not divisible by {parts} ({processes} "
                f"processes times training.accumulate {config.training.accumulate}); the nearest that is: "
                f"{max(1, round(size / parts)) * parts}"
            )


def fit(
    stage: Objective,
    folder: Path,
    accelerator: Accelerator,
    *,
    must_agree: dict[str, Any],
    resume: bool,
    early: EarlyAverage | None = None,
) -> Path:
    """Train `stage` to its last step and return the folder of its last checkpoint.

    Args:
        stage: what to learn.
        folder: of the stage in the run folder.
        accelerator: from `processes.make_accelerator`.
        must_agree: what a checkpoint must agree on to be continued, kept in its state.json.
        resume: continue from the last checkpoint in `folder`, if there is one.
        early: what to leave behind for another stage on the way.

    Raises:
        UserError: the training diverges, a checkpoint is damaged or does not fit, the disk is full.
        Interrupted: after SIGINT or SIGTERM to any of the processes, with the state saved.
    """
    try:
        return _Fit(stage, folder, accelerator, must_agree, early).run(resume)
    finally:
        accelerator.free_memory()  # or it would hold every stage's weights to the end


class _Fit:
    def __init__(
        self,
        stage: Objective,
        folder: Path,
        accelerator: Accelerator,
        must_agree: dict[str, Any],
        early: EarlyAverage | None,
    ):
        self.stage, self.folder, self.accelerator, self.must_agree = stage, folder, accelerator, must_agree
        self.early = early
        self.settings, self.training = stage.settings, stage.config.training
        self.state = TrainingState(stage, folder / "checkpoints", accelerator)

    def run(self, resume: bool) -> Path:
        on_main(self.accelerator, self._tidy)
        start, finished = self._resume() if resume else (0, False)
        last = max(start, self.settings.steps)
        if start == last and not finished:
            self._finish()
            self.state.save(last, self.must_agree, finished=True)
        with stop_signals() as stopped:
            while start < last:
                try:
                    self._loop(start, stopped)
                    break
                except Diverged as failure:
                    start = self._roll_back(failure)
        return self.state.path(last)

    def _finish(self) -> None:
        with self.state.averaged_weights(), torch.no_grad(), self.accelerator.autocast():
            self.stage.finish()

    def _loop(self, start: int, stopped: list[int]) -> None:
        on_main(self.accelerator, lambda: self._drop_metrics_after(start))
        training, last = self.training, self.settings.steps
        stream, meter = self._images(start), Meter()
        with Progress(self.stage.name, start, last, silent=not self.accelerator.is_main_process) as progress:
            for step in range(start + 1, last + 1):
                with meter.waiting():
                    batch = next(stream)
                self.state.position = batch.get("position")
                loss, norm, metrics, stop = self._step(step, batch, bool(stopped))
                meter.count(loss, self.settings.batch_size)
                if step % training.log_every == 0 or step == last:
                    self._log(step, {**meter.read(), "grad_norm": norm}, metrics, progress)
                if step == last:
                    self._finish()
                # before the checkpoint, or a run killed between the two would never make it
                if step == last or step % training.preview_every == 0:
                    self._preview(step)
                if self.early and step == self.early.step:
                    self.state.save(step, self.must_agree, finished=True, folder=self.early.folder)
                due = step % training.checkpoint_every == 0 and not self.state.guard.bad
                if step == last or stop or due:
                    self.state.save(step, self.must_agree, finished=step == last)
                if stop or (step == last and self._any(bool(stopped))):
                    raise Interrupted(
                        f"stopped at step {step} of stage {self.stage.name}; everything is saved"
                    )

    def _any(self, here: bool) -> bool:
        """Whether something is so in any process."""
        return bool(self.accelerator.reduce(torch.tensor(float(here), device=self.accelerator.device)) > 0)

    def _images(self, start: int) -> Iterator[dict[str, Any]]:
        # a stream continues where it is, also after a rollback; other data comes in another order then
        position = self.state.position
        seed = derive_seed(self.training.seed, self.stage.name, "data") if position else self._seed("data")
        return batches(
            self.stage.context.data,
            batch_size=self.settings.batch_size,
            seed=seed,
            start=start,
            stop=self.settings.steps,
            workers=self.stage.config.data.workers,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            **({"position": position} if position else {}),
        )

    def _seed(self, *names: str | int) -> int:
        """Of a stream of this stage; each rollback has streams of its own."""
        again = (f"attempt-{self.state.guard.attempt}",) if self.state.guard.attempt else ()
        return derive_seed(self.training.seed, self.stage.name, *again, *names)

    # One step

    def _step(
        self, step: int, batch: dict[str, Tensor], stopped: bool
    ) -> tuple[float, float, dict[str, Tensor], bool]:
        """Learn from a batch; return loss, gradient norm, metrics, and whether any process must stop."""
        for group, rate in zip(self.state.optimizer.param_groups, self.state.base_rates, strict=True):
            group["lr"] = rate * rate_factor(step, self.settings) * self.state.guard.rate
        self.state.model.train()
        metrics = self._gradients_compiled(step, batch)
        norm = whole(self.accelerator.clip_grad_norm_(self.state.parameters, self.settings.clip))
        # one exchange and one wait for the device a step
        shared = torch.stack((metrics.pop("loss"), norm, torch.full_like(norm, float(stopped))))
        loss, norm, stops = self.accelerator.reduce(shared, "mean").tolist()
        fault = self._fault(loss, norm)
        if not fault:
            self.state.optimizer.step()
            self.state.averages.update(self.state.parameters)
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.state.optimizer.zero_grad()
        if self.state.guard.bad:
            self._report(step, fault, batch)
        return loss, norm, metrics, stops > 0

    def _gradients_compiled(self, step: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `_gradients`; where compiling fails, the stage continues without it."""
        try:
            return self._gradients(step, batch)
        except COMPILER_ERRORS as error:
            if self.training.compile == "none" or not self.stage.uncompile():
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = next((line for line in lines if "Error" in line), lines[0])
            self._say(f"{self.stage.name}: torch.compile failed ({reason}); training continues without it")
            self.state.optimizer.zero_grad()
            return self._gradients(step, batch)

    def _gradients(self, step: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add up the gradients of the parts of this process's batch; return loss and metrics, averaged."""
        device, parts = self.accelerator.device, self.training.accumulate
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor)}
        size = len(batch["index"]) // parts
        first = self.accelerator.process_index * len(batch["index"])
        results = []
        for i in range(parts):
            part = {k: v[i * size : (i + 1) * size] for k, v in batch.items()}
            noise = BatchNoise(
                self._seed("noise", step),
                batch_size=self.settings.batch_size,
                positions=range(first + i * size, first + (i + 1) * size),
                device=device,
            )
            with gradients(self.state.model, self.accelerator, complete=i == parts - 1):
                with self.accelerator.autocast():
                    loss, metrics = self.stage.learn(self.state.model, part, noise)
                self.accelerator.backward(loss / parts)
            results.append({"loss": loss.detach().float(), **metrics})
        return {name: torch.stack([result[name] for result in results]).mean() for name in results[0]}

    def _fault(self, loss: float, norm: float) -> str:
        """Say what is wrong with a step that must be skipped."""
        scaler = self.accelerator.scaler
        if scaler is not None and math.isfinite(loss) and not math.isfinite(norm) and scaler.get_scale() > 1:
            return "the scale of fp16 was too large"  # which its next update mends
        return self.state.guard.judge(loss, norm, self.training.spike)

    def _report(self, step: int, fault: str, batch: dict[str, Tensor]) -> None:
        """Tell of a bad step; after PATIENCE of them in a row give this attempt up."""
        bad = self.state.guard.bad
        self._say(f"{self.stage.name} step {step}: {fault}; skipped ({bad} in a row)")
        if bad >= PATIENCE:
            weights = (local(p).detach() for p in self.state.parameters)
            largest = max(weight.abs().max().item() for weight in weights if weight.numel())
            images = "finite" if torch.isfinite(batch["image"]).all() else "not finite"
            rate = self.state.optimizer.param_groups[0]["lr"]
            raise Diverged(
                step,
                f"{fault}. The learning rate is {rate:g}, the largest weight {largest:g}, the images are "
                f"{images}",
            )

    def _roll_back(self, failure: Diverged) -> int:
        """Return to the last good checkpoint, with other images and noise and half the learning rate."""
        step, seen = failure.args
        name, state, failed = self.stage.name, self.state, self.state.guard
        good = state.good_steps()
        if not good or failed.rollbacks >= ROLLBACKS:
            kept = (
                f"The last checkpoint is intact, after {ROLLBACKS} returns to it"
                if good
                else "There is no checkpoint to return to"
            )
            raise UserError(
                f"stage {name}, step {step}: {PATIENCE} bad steps in a row; {seen}. {kept}. Lower "
                f"training.{self.stage.spec.section}.learning_rate, raise its warmup_steps, or try "
                "training.precision=fp32"
            )
        self.accelerator.wait_for_everyone()  # until all know what is good
        on_main(self.accelerator, lambda: state.remove_after(good[-1]))
        position = state.position
        state.load(good[-1])
        state.position = position
        state.guard = failed.after_rollback(state.guard, step)
        self._say(f"{name}: back to step {good[-1]}, with other images and noise and half the learning rate")
        return good[-1]

    def _resume(self) -> tuple[int, bool]:
        """Load the last checkpoint, if there is one; return its step and whether the stage ended there."""
        steps = self.state.steps()
        if not steps:
            return 0, False
        folder = self.state.path(steps[-1])
        saved = checkpoint.load_state(folder)
        checkpoint.check_agreement(folder, self.must_agree, self.stage.name)
        finished, more = saved["finished"], steps[-1] < self.settings.steps
        if finished and more and self.settings.schedule in FALLING:
            raise UserError(
                f"stage {self.stage.name} ended at step {steps[-1]}, where its {self.settings.schedule} "
                f"schedule brought the learning rate to 0; {self.settings.steps} steps would make it jump up "
                f"again. Set training.{self.stage.spec.section}.steps={steps[-1]}, or train the stage again "
                "with --no-resume"
            )
        if more or not finished:
            self.state.load(steps[-1])
        return steps[-1], finished

    # What is written

    def _log(
        self, step: int, reading: dict[str, Any], metrics: dict[str, Tensor], progress: Progress
    ) -> None:
        means = {k: self.accelerator.reduce(v.float(), "mean").item() for k, v in metrics.items()}
        record = {
            **reading,
            "learning_rate": self.state.optimizer.param_groups[0]["lr"],
            "memory_gb": round(memory_gb(self.accelerator.device), 3),
            "skipped": self.state.guard.skipped,
            "rollbacks": self.state.guard.attempt,
            **means,
        }
        finite = {k: v for k, v in record.items() if v is not None and math.isfinite(v)}
        path = self.folder / "metrics.jsonl"
        if self.accelerator.is_main_process:
            with explained(path), open(path, "a", encoding="utf-8") as log:
                log.write(json.dumps({"step": step, **{k: finite.get(k) for k in record}}) + "\n")
        with explained(self.folder.parent / "logs"):
            self.accelerator.log({f"{self.stage.name}/{k}": v for k, v in finite.items()}, step=step)
        loss = "loss -" if reading["loss"] is None else f"loss {reading['loss']:.4f}"
        speed = f"{reading['images_per_second']:.0f} images/s"
        progress.update(step, f"{loss}  {speed}  {record['memory_gb']:.1f} GB")

    def _tidy(self) -> None:
        """Make the stage's folders and clear them of what killed processes left."""
        with explained(self.folder):
            for folder in (self.folder, self.folder / "previews", self.state.folder):
                folder.mkdir(parents=True, exist_ok=True)
                clear_unfinished(folder)

    def _drop_metrics_after(self, start: int) -> None:
        """Forget lines of steps that will be made again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [record for record in read_records(path) if record.get("step", start + 1) <= start]
            with explained(path):
                write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def _visible(self, rows: list[Tensor]) -> list[Tensor]:
        """Make rows of images (or of codec latents, all decoded at once) visible."""
        shown = self.stage.context.data.show(torch.cat(rows))
        return list(shown.split([len(row) for row in rows]))

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(text, file=sys.stderr, flush=True)

    def _preview(self, step: int) -> None:
        def draw() -> None:
            with torch.no_grad(), self.accelerator.autocast():
                rows = self._visible(self.stage.preview())
            scale = max(1, 64 // rows[0].shape[-1])
            path = self.folder / "previews" / f"step-{step:06d}.png"
            with explained(path), written_whole(path) as unfinished:
                image_grid(rows, scale=scale).save(unfinished)

        with self.state.averaged_weights():
            on_main(self.accelerator, draw)


def rate_factor(step: int, settings: StageConfig) -> float:
    """Return the share of the learning rate at `step` (from 1): linear warm-up, then the schedule."""
    begin = max(1, settings.warmup_steps)
    if step < begin or settings.schedule == "constant":
        return min(1.0, step / begin)
    if settings.schedule == "inverse-sqrt":
        return math.sqrt(begin / step)
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
