"""Worse networks for autoguidance that nobody has to train: what a network's average was early on.

Autoguidance (arXiv 2406.02507) compares with a worse network of the same kind. With `early`, such a stage is
what the average of the trained network's weights was after so many steps; that training leaves it there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lediflow.errors import UserError
from lediflow.training import checkpoint
from lediflow.training.config import Config
from lediflow.training.stages import STAGES, StageSpec


@dataclass(frozen=True)
class EarlyAverage:
    """What a training leaves behind on its way.

    Attributes:
        step: after which.
        folder: of the checkpoints of the stage that it is for.
    """

    step: int
    folder: Path


def early_average(spec: StageSpec, config: Config, run: Path) -> EarlyAverage | None:
    """Return what the training of a stage must leave behind; None for nothing."""
    for weak in STAGES.values():
        if weak.early_of == spec.name and is_early(weak, config):
            return EarlyAverage(config.stage(weak.name).steps, _checkpoints(run, weak.name))
    return None


def is_early(spec: StageSpec, config: Config) -> bool:
    """Whether a stage is left behind by another, so that there is nothing to train."""
    return spec.early_of is not None and config.stage(spec.name).early


def check_early(config: Config, stages: Iterable[StageSpec]) -> None:
    """Refuse an average that is no earlier than the network that it should be worse than.

    Raises:
        UserError: naming both numbers of steps.
    """
    for spec in stages:
        if spec.early_of is None or not is_early(spec, config):
            continue
        steps, all_steps = config.stage(spec.name).steps, config.stage(spec.early_of).steps
        if steps >= all_steps:
            raise UserError(
                f"training.{spec.section}.early: its average is that of step {steps}, and stage "
                f"{spec.early_of} has {all_steps} steps; set training.{spec.section}.steps to an eighth of "
                "them, or less"
            )


def check_left_behind(config: Config, run: Path, stages: list[StageSpec], resume: bool) -> None:
    """Refuse an early average that is not there, and that these stages will not leave behind.

    Raises:
        UserError: with what to do.
    """
    names = {spec.name for spec in stages}
    for spec in stages:
        if spec.early_of is None or not is_early(spec, config):
            continue
        step = config.stage(spec.name).steps
        there = resume and step in checkpoint.steps_on_disk(_checkpoints(run, spec.name))
        made = checkpoint.steps_on_disk(_checkpoints(run, spec.early_of)) if resume else []
        if not there and (spec.early_of not in names or max(made, default=0) >= step):
            raise UserError(
                f"training.{spec.section}.early: {run} has no average of {spec.early_of} after {step} steps. "
                f"Train {spec.early_of} again, with --no-resume and both --stage {spec.early_of} and --stage "
                f"{spec.name}; or set training.{spec.section}.early=false"
            )


def _checkpoints(run: Path, stage: str) -> Path:
    return run / stage / "checkpoints"
