"""Where tokens are in an image: axial positions, and the rotary embeddings made of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lediflow.networks.attention import compile_time_constant


def axial_positions(grid: tuple[int, int]) -> Tensor:
    """Return the centres (y, x) of the cells in the box [-1, 1]^2 fitted to the grid: float64 (H, W, 2).

    The box depends on the aspect alone, so a 2x2 mean of these positions is the coarser grid's own.
    """
    h, w = grid
    y_max, x_max = min(1.0, h / w), min(1.0, w / h)
    y = (2 * torch.arange(h, dtype=torch.float64) + 1 - h) / h * y_max
    x = (2 * torch.arange(w, dtype=torch.float64) + 1 - w) / w * x_max
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)


@compile_time_constant
def rope_table(
    grid: tuple[int, int],
    n_heads: int,
    d_head: int,
    device: torch.device,
    dtype: torch.dtype,
    trained_side: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angles of axial rotary embeddings, each (H*W, n_heads, d_head // 4).

    Half of each head turns: d_head / 8 frequencies for each axis, log-spaced from pi to 10 pi and interleaved
    across the heads. With a `trained_side` two neighbours are as far apart as in a grid of that longer side,
    whatever this grid is.
    """
    n = d_head // 8
    ends = math.log(math.pi), math.log(10 * math.pi)
    log_frequencies = torch.linspace(*ends, n_heads * n + 1, dtype=torch.float64)[:-1]
    frequencies = log_frequencies.exp().view(n, n_heads).T  # (n_heads, n)
    positions = axial_positions(grid).reshape(-1, 1, 2, 1)
    if trained_side is not None:
        positions = positions * (max(grid) / trained_side)
    theta = (positions * frequencies[None, :, None, :]).flatten(2)  # y angles, then x angles
    return theta.cos().to(dtype).to(device), theta.sin().to(dtype).to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first half of each head of x (B, H*W, n_heads, d_head) by the angles of `rope_table`."""
    d = cos.shape[-1]
    x1, x2, rest = x[..., :d], x[..., d : 2 * d], x[..., 2 * d :]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), dim=-1)
