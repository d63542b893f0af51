"""Checkpoints: complete, written beside and renamed into place, and never pickled.

A checkpoint is a folder `step-N` with model.safetensors (weights), ema.safetensors (the first average of the
weights, and buffers: what is used afterwards), ema-NAME.safetensors for each further average,
optimizer.safetensors, and state.json. Images, noise and learning rate of a step follow from the seed, the
step and the count of rollbacks in state.json, so no other random state is needed; a stream of images also has
its position there, for each process. Tensors are whole, also when training held them in shards: any number of
processes can resume.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lediflow.errors import UserError
from lediflow.files import remove_folder, write_folder, write_text
from lediflow.training.processes import cut_like


def steps_on_disk(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in `folder`, ascending."""
    names = (p.name.removeprefix("step-") for p in folder.glob("step-*") if p.is_dir())
    return sorted(int(n) for n in names if n.isdigit())


def save(
    folder: Path,
    step: int,
    *,
    files: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Write the checkpoint `folder/step-N` whole or not at all, then delete older ones.

    Args:
        folder: of all checkpoints of a stage.
        step: N.
        files: tensors by name, for each safetensors file by its name without the suffix.
        state: what else goes into state.json.
        keep: how many checkpoints to keep, at least 1.
        keep_every: steps divisible by this are also kept; 0 for none.

    Raises:
        UserError: the disk is full or the folder cannot be written; earlier checkpoints are as they were.
    """
    target = folder / f"step-{step}"

    def fill(fresh: Path) -> None:
        for name, tensors in files.items():
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, fresh / f"{name}.safetensors")
        write_text(fresh / "state.json", json.dumps({"step": step, **state}, indent=1))

    write_folder(target, fill)
    for old in steps_on_disk(folder)[:-keep]:
        if not keep_every or old % keep_every:
            remove_folder(folder / f"step-{old}")
    return target


def load_state(folder: Path) -> dict[str, Any]:
    """Return state.json of the checkpoint `folder`.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from None
    if not isinstance(state, dict):
        raise _damaged(folder, ValueError("state.json is no JSON object"))
    return state


def check_agreement(folder: Path, must_agree: Mapping[str, Any], stage: str) -> None:
    """Refuse to continue the checkpoint `folder` with something else than it was trained with.

    Args:
        folder: of the checkpoint.
        must_agree: what is so now, by its key in state.json.
        stage: its name.

    Raises:
        UserError: naming the first difference.
    """
    saved = load_state(folder)
    for key, value in must_agree.items():
        if saved.get(key) != value:
            raise UserError(
                f"{folder} was trained with another {key} ({saved.get(key)}, now {value}); use --no-resume "
                f"to train stage {stage} again"
            )


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read one safetensors file of the checkpoint `folder`.

    Raises:
        UserError: it is missing or cut short; the message says how to continue.
    """
    try:
        return load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, error) from None


def _damaged(folder: Path, error: Exception) -> UserError:
    earlier = [s for s in steps_on_disk(folder.parent) if folder.parent / f"step-{s}" != folder]
    advice = f"to resume from step {earlier[-1]}" if earlier else "to start this stage again"
    return UserError(f"checkpoint {folder} is damaged or cut short ({error}); delete that folder {advice}")


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Put the saved state of AdamW back; the groups' settings stay those of `optimizer`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(folder, "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        # moments have the shape of their parameter and are cut as it is; the count of steps is a scalar
        state.setdefault(int(index), {})[name] = cut_like(tensor, parameter) if tensor.ndim else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of AdamW as tensors by the number of the parameter and the name of the moment."""
    return {
        f"{index}.{name}": tensor
        for index, state in optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }


def digest(folder: Path) -> str:
    """Return a short hash of the averaged weights in the checkpoint `folder`, to tell models apart."""
    with open(folder / "ema.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
