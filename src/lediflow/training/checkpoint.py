"""Checkpoints: complete, written beside and renamed into place, and never pickled.

A checkpoint is a folder `step-N` with model.safetensors (weights), ema.safetensors (averaged weights and
buffers: what is used afterwards), optimizer.safetensors, and state.json.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lediflow.errors import UserError
from lediflow.files import write_folder, write_text

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


def steps_on_disk(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in `folder`, ascending."""
    names = (p.name.removeprefix("step-") for p in folder.glob("step-*") if p.is_dir())
    return sorted(int(n) for n in names if n.isdigit())


def save(
    folder: Path,
    step: int,
    *,
    model: dict[str, Tensor],
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint `folder/step-N` whole or not at all, then delete all but the last `keep`."""
    target = folder / f"step-{step}"

    def fill(fresh: Path) -> None:
        contents = (model, ema, _optimizer_tensors(optimizer))
        for name, tensors in zip(FILES, contents, strict=True):
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, fresh / name)
        write_text(fresh / "state.json", json.dumps({"step": step, **state}, indent=1))

    write_folder(target, fill)
    for old in steps_on_disk(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old}")
    return target


def load_state(folder: Path) -> dict[str, Any]:
    """Return state.json of the checkpoint `folder`.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return state
    except (OSError, json.JSONDecodeError) as error:
        raise _damaged(folder, error) from None


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read one safetensors file of the checkpoint `folder`.

    Raises:
        UserError: it is missing or cut short; the message says how to go on.
    """
    try:
        return load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, error) from None


def _damaged(folder: Path, error: Exception) -> UserError:
    earlier = [s for s in steps_on_disk(folder.parent) if folder.parent / f"step-{s}" != folder]
    advice = f"to go on from step {earlier[-1]}" if earlier else "to start this stage again"
    return UserError(f"checkpoint {folder} is damaged or cut short ({error}); delete that folder {advice}")


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Put the saved state of AdamW back; the groups' settings stay those of `optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(folder, "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": tensor
        for index, state in optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }


def digest(folder: Path) -> str:
    """Return a short hash of the averaged weights in the checkpoint `folder`, to tell models apart."""
    with open(folder / "ema.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
