"""Global and neighbourhood self-attention on a grid of tokens, and which computation is used.

Neighbourhood attention has NATTEN's semantics (arXiv 2204.07143): every query sees exactly K x K keys; near
a border the window shifts inward instead of shrinking. Where a side of the grid is shorter than K, attention
is global.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def self_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], kernel_size: int | None = None
) -> Tensor:
    """Attend with softmax(q k^T) v, scale 1 (queries and keys carry their own scale).

    Args:
        q: queries, (B, heads, H*W, d), tokens in row-major order of the grid.
        k: keys, same shape.
        v: values, same shape.
        grid: (H, W).
        kernel_size: odd side K of the neighbourhood; None for global attention.

    Returns:
        (B, heads, H*W, d).
    """
    mask = None
    if kernel_size is not None and min(grid) >= kernel_size and max(grid) > kernel_size:
        mask = uncached(neighborhood_mask)(grid, kernel_size, q.device)
    if _explicit_is_faster(q):
        return _explicit_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


def uncached(function: Any) -> Any:
    """Return an lru_cached function without its cache while torch.compile traces it.

    The compiler folds the result into the graph as a constant, and warns of caches that it does not know.
    """
    return function.__wrapped__ if torch.compiler.is_compiling() else function


def _explicit_is_faster(q: Tensor) -> bool:
    # the backward of torch's fused attention is slow on the CPU in bf16 (it does not use the matrix unit)
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    if mask is not None:
        # in place and additive: no copy here, and nothing to do in the backward
        scores += torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


@lru_cache(maxsize=32)
def neighborhood_mask(grid: tuple[int, int], kernel_size: int, device: torch.device) -> Tensor:
    """Return the boolean (H*W, H*W) mask that is True where the row's query sees the column's key.

    Raises:
        ValueError: a side of the grid is shorter than the kernel.
    """
    if min(grid) < kernel_size:
        raise ValueError(f"grid {grid} has a side shorter than the neighbourhood kernel {kernel_size}")
    # a mask first made in inference mode could not be used in training afterwards
    with torch.inference_mode(False):
        rows, columns = (_window(n, kernel_size, device) for n in grid)
        both = rows[:, None, :, None] & columns[None, :, None, :]  # (H, W, H, W)
        n = grid[0] * grid[1]
        return both.reshape(n, n)


def _window(n: int, kernel_size: int, device: torch.device) -> Tensor:
    """(n, n) mask of one axis: query i sees the K keys from clamp(i - K // 2, 0, n - K) on."""
    i = torch.arange(n, device=device)
    start = (i - kernel_size // 2).clamp(0, n - kernel_size)[:, None]
    return (i >= start) & (i < start + kernel_size)
