"""Global and neighbourhood self-attention on a grid of tokens, and which computation is used.

Neighbourhood attention has NATTEN's semantics (arXiv 2204.07143): every query sees exactly K x K keys; near
a border the window shifts inward instead of shrinking. Where a side of the grid is shorter than K, attention
is global. It is computed exactly, in one of two ways: as global attention under a mask on small grids, and on
larger ones tile by tile, each tile of queries against the keys within its reach.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TILED_FROM = 32 * 32  # tokens; below, a mask over the whole grid is faster
TILE = 8


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
    if kernel_size is None or min(grid) < kernel_size or max(grid) == kernel_size:
        return _attend(q, k, v)
    if grid[0] * grid[1] >= TILED_FROM:
        return tiled_attention(q, k, v, grid, kernel_size)
    return _attend(q, k, v, uncached(neighborhood_mask)(grid, kernel_size, q.device))


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], kernel_size: int, tile: int = TILE
) -> Tensor:
    """Neighbourhood attention, one tile x tile square of queries at a time; arguments as `self_attention`.

    The work grows linearly with the tokens: a tile reads (tile + K - 1)^2 keys wherever it lies.
    """
    b, heads, _, d = q.shape
    queries, keys, mask, order = uncached(_tiles)(grid, kernel_size, tile, q.device)
    tiles = len(mask)

    def gather(x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(2, index).view(b, heads, tiles, -1, d)

    y = _attend(gather(q, queries), gather(k, keys), gather(v, keys), mask)
    return y.reshape(b, heads, -1, d).index_select(2, order)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    if _explicit_is_faster(q, k):
        return _explicit_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


def uncached(function: Any) -> Any:
    """Return an lru_cached function without its cache while torch.compile traces it.

    The compiler folds the result into the graph as a constant, and warns of caches that it does not know.
    """
    return function.__wrapped__ if torch.compiler.is_compiling() else function


def _explicit_is_faster(q: Tensor, k: Tensor) -> bool:
    # on the CPU torch's fused attention loses where the scores of a head fit in the cache, and its backward
    # in bf16 is slow at any size (it does not use the matrix unit)
    if q.device.type != "cpu":
        return False
    in_cache = q.shape[-2] * k.shape[-2] <= 2**14
    return in_cache or (q.dtype == torch.bfloat16 and torch.is_grad_enabled())


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
        everything = [torch.arange(n, device=device) for n in grid]
        rows, columns = (
            _seen(i, i, n, kernel_size) for i, n in zip(everything, grid, strict=True)
        )  # (H, H) and (W, W)
        both = rows[:, None, :, None] & columns[None, :, None, :]
        return both.reshape(grid[0] * grid[1], -1)


def _seen(query: Tensor, key: Tensor, n: int, kernel_size: int) -> Tensor:
    """(..., queries, keys) mask of one axis of length n: K keys from clamp(query - K // 2, 0, n - K) on."""
    start = (query - kernel_size // 2).clamp(0, n - kernel_size)[..., :, None]
    key = key[..., None, :]
    return (key >= start) & (key < start + kernel_size)


@lru_cache(maxsize=32)
def _tiles(
    grid: tuple[int, int], kernel_size: int, tile: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `tiled_attention` gathers, for all tiles in row-major order.

    Returns:
        Token indices of the queries (tiles * tile^2,) and of the keys (tiles * reach^2,), the mask
        (tiles, tile^2, reach^2), and where each token's result stands among the queries (H*W,).
    """
    with torch.inference_mode(False):
        (qy, ky, my), (qx, kx, mx) = (_axis_tiles(n, kernel_size, tile, device) for n in grid)

        def tokens(y: Tensor, x: Tensor) -> Tensor:
            return (y[:, None, :, None] * grid[1] + x[None, :, None, :]).flatten()

        mask = my[:, None, :, None, :, None] & mx[None, :, None, :, None, :]
        mask = mask.reshape(len(qy) * len(qx), tile**2, -1)
        queries = tokens(qy, qx)
        # a tile that overhangs the grid repeats the last token: any of its places holds the same result
        order = torch.empty(grid[0] * grid[1], dtype=torch.long, device=device)
        order[queries] = torch.arange(len(queries), device=device)
        return queries, tokens(ky, kx), mask, order


def _axis_tiles(n: int, kernel_size: int, tile: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One axis of length n: positions of queries (tiles, tile) and keys (tiles, reach), and their mask."""
    first = torch.arange(0, n, tile, device=device)
    queries = (first[:, None] + torch.arange(tile, device=device)).clamp_max(n - 1)
    reach = min(n, tile + kernel_size - 1)
    start = (first - kernel_size // 2).clamp(0, n - reach)
    keys = start[:, None] + torch.arange(reach, device=device)
    return queries, keys, _seen(queries, keys, n, kernel_size)
