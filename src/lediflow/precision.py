"""Number formats by name, and which one a device is fast in."""

from __future__ import annotations

from typing import Literal

import torch

from lediflow.errors import UserError, nearest

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # what networks are autocast to


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
