"""Images at the edges: 8-bit pixels, PIL images, grids. Inside they are float tensors in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lediflow.errors import UserError


def to_float(images: Tensor) -> Tensor:
    """Bring uint8 values 0 to 255, of any shape, to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Bring float values in [-1, 1], of any shape, to uint8 by rounding; values beyond are cut off."""
    return ((images.to(torch.float32) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Turn images (N, C, H, W) in [-1, 1], C 1 or 3, into PIL images of mode L or RGB."""
    arrays = to_uint8(images).movedim(1, -1).cpu().numpy()
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]


def image_grid(
    rows: Sequence[Tensor] | Tensor, *, columns: int | None = None, scale: int = 1, pad: int = 2
) -> Image.Image:
    """Lay images out in a grid on white.

    Args:
        rows: images (N, C, H, W), float in [-1, 1] with C 1 or 3; or a sequence of such tensors, each
            of which starts a new row. Values outside are clamped, those that are no number come out black.
        columns: images per row, after which a row wraps. None stands for the square root of N (rounded
            up) for one tensor and for the longest of several.
        scale: each pixel becomes ``scale`` x ``scale`` pixels, without smoothing.
        pad: pixels of white between the images and around the grid, not scaled.

    Returns:
        An RGB image, or "L" when all images are grey, of width
        ``columns * (W * scale + pad) + pad``, likewise in height.

    Raises:
        UserError: if there is no image, their sizes differ, or a number is out of range.
    """
    tensors = [rows] if isinstance(rows, Tensor) else list(rows)
    if not tensors or any(t.ndim != 4 or len(t) == 0 or t.shape[1] not in (1, 3) for t in tensors):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors) or "nothing"
        raise UserError(f"a grid needs images (N, C, H, W) with C 1 or 3 and N at least 1, not {shapes}")
    if len({tuple(t.shape[2:]) for t in tensors}) > 1:
        raise UserError("all images of a grid must have the same height and width")
    if columns is None:
        columns = ceil(sqrt(len(rows))) if isinstance(rows, Tensor) else max(len(t) for t in tensors)
    if columns < 1 or scale < 1 or pad < 0:
        raise UserError(
            f"a grid needs columns and scale of at least 1 and no negative pad, not {columns}, {scale}, {pad}"
        )
    lines = [line for tensor in tensors for line in tensor.split(columns)]
    mode = "L" if all(t.shape[1] == 1 for t in tensors) else "RGB"
    height, width = (side * scale for side in tensors[0].shape[2:])
    size = (columns * (width + pad) + pad, len(lines) * (height + pad) + pad)
    grid = Image.new(mode, size, "white")
    for row, line in enumerate(lines):
        for column, pixels in enumerate(_to_bytes(line)):
            cell = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            grid.paste(cell, (pad + column * (width + pad), pad + row * (height + pad)))
    return grid


def _to_bytes(images: Tensor) -> Any:
    """Return images (N, C, H, W) in [-1, 1] as uint8 arrays, (N, H, W) or (N, H, W, 3)."""
    pixels = to_uint8(torch.nan_to_num(images.detach().cpu(), nan=-1.0))
    return (pixels[:, 0] if pixels.shape[1] == 1 else pixels.permute(0, 2, 3, 1)).numpy()
