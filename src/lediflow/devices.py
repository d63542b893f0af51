"""Where tensors live, and in which number format: devices and precisions by name; and how busy it is."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor

from lediflow.errors import UserError, nearest

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # what networks are autocast to


def check_device(device: str | None) -> torch.device:
    """Return the torch device of a name, the best there is for None.

    Raises:
        UserError: the name is unknown, or this machine has no such device.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device is None:
        return torch.device("cuda" if there["cuda"] else "mps" if there["mps"] else "cpu")
    kind, _, index = device.partition(":")
    if kind not in there or (":" in device and not index.isdecimal()):
        raise UserError(f"unknown device {device!r}; choose cpu, cuda or mps, or one GPU as in cuda:1")
    if not there[kind]:
        raise UserError(
            f"this machine has no {kind} device that torch can use; leave --device out or use cpu"
        )
    if kind == "cuda" and index and int(index) >= (count := torch.cuda.device_count()):
        raise UserError(f"there is no {device}: this machine has {count} CUDA devices, from cuda:0 on")
    return torch.device(device)


def finest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device that has nothing finer (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def to_device(x: Tensor, device: torch.device | str | None) -> Tensor:
    """Copy x from the CPU to a device, not waiting for what a CUDA device still has to do."""
    if device is None or torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def settle_precision(wanted: str, device: torch.device) -> str:
    """Return "fp32", "bf16" or "fp16": what is wanted, and for "auto" what the device is fast in.

    That is bf16 where there are instructions for its products, and fp32 elsewhere, where bf16 is emulated at
    a half to a fifth of the speed.

    Raises:
        UserError: an unknown name.
    """
    if wanted in DTYPES:
        return wanted
    if wanted != "auto":
        known = ("auto", *DTYPES)
        raise UserError(f"unknown dtype {wanted!r}{nearest(wanted, known)}; choose from {', '.join(known)}")
    return "bf16" if _multiplies_bf16(device) else "fp32"


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        return any(has is True and "bf16" in name for name, has in torch.cpu.get_capabilities().items())
    return bool(torch.cpu._is_avx512_bf16_supported())


def load_words() -> str:
    """Say that other work wants the processor's cores, where it does; else nothing."""
    load, cores = psutil.getloadavg()[0], psutil.cpu_count() or 1
    if load < 0.75 * cores:
        return ""
    return f"this machine is busy (load {load:.1f} on {cores} cores)"
