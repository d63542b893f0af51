"""Stages that are not learned step by step: all is done at once, and kept as any stage is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lediflow.files import clear_unfinished, explained, write_text, written_whole
from lediflow.pictures import image_grid
from lediflow.training import checkpoint
from lediflow.training.objectives import Objective
from lediflow.training.processes import on_main


def solve(
    stage: Objective, folder: Path, accelerator: Accelerator, *, must_agree: dict[str, Any], resume: bool
) -> Path:
    """Let a stage do all of its work, unless it is done; return the folder of its checkpoint.

    Args:
        stage: with `by_gradients` False.
        folder: of the stage in the run folder.
        accelerator: of the processes; the main one works.
        must_agree: what a checkpoint must agree on to be kept, in its state.json.
        resume: keep what is there.

    Raises:
        UserError: what is there was made of something else, or the disk is full.
    """
    kept = folder / "checkpoints"
    steps = checkpoint.steps_on_disk(kept) if resume else []
    if steps:
        last = kept / f"step-{steps[-1]}"
        checkpoint.check_agreement(last, must_agree, stage.name)
        return last

    def work() -> None:
        with explained(folder):
            for made in (folder, folder / "previews", kept):
                made.mkdir(parents=True, exist_ok=True)
                clear_unfinished(made)
        with torch.no_grad(), accelerator.autocast():
            stage.finish()
            shown = stage.context.data.show(torch.cat(stage.preview()))
        network = stage.network.state_dict()
        others = [f"ema-{average.name}" for average in stage.config.training.ema[1:]]
        state = {**must_agree, "finished": True, "seed": stage.config.training.seed}
        files = dict.fromkeys(("model", "ema", *others), network)
        checkpoint.save(kept, 1, files=files, state=state, keep=1)
        with explained(folder):
            write_text(folder / "metrics.jsonl", json.dumps({"step": 1, **stage.report()}) + "\n")
            path = folder / "previews" / "step-000001.png"
            with written_whole(path) as unfinished:
                image_grid([shown], scale=max(1, 64 // shown.shape[-1])).save(unfinished)

    on_main(accelerator, work)
    return kept / "step-1"
