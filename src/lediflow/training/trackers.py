"""Where the curves go besides metrics.jsonl: TensorBoard, Weights & Biases or trackio, through Accelerate."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from accelerate import Accelerator

from lediflow.errors import UserError
from lediflow.training.config import Config


def check_tracker(config: Config) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        UserError: with the name of the package.
    """
    name = config.training.tracker
    if name != "none" and find_spec(name) is None:
        raise UserError(
            f"training.tracker={name} needs the package {name}: pip install {name}, or choose another tracker"
        )


def start_tracker(accelerator: Accelerator, config: Config, run: Path, stage: str) -> None:
    """Begin the curves of a stage; each has its own, for every stage counts its steps from 1."""
    name = config.training.tracker
    title = f"{run.resolve().name}/{stage}"
    accelerator.init_trackers(
        # TensorBoard takes the project for a folder in RUN/logs
        stage if name == "tensorboard" else "lediflow",
        config=None if name == "tensorboard" else config.model_dump(mode="json"),
        init_kwargs={"wandb": {"name": title, "dir": str(run)}, "trackio": {"name": title}},
    )


def stop_tracker(accelerator: Accelerator) -> None:
    """End the curves of a stage."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []
