"""Global and neighbourhood self-attention on a grid of tokens, and which backend computes it.

Neighbourhood attention has NATTEN's semantics (arXiv 2204.07143): every query sees exactly K x K keys; near
a border the window shifts inward instead of shrinking. Where a side of the grid is shorter than K, attention
is global. Every backend computes it exactly:

dense   global attention under a mask; the fastest on small grids, anywhere
tiles   a tile of queries at a time, against the keys within its reach; linear in the tokens, anywhere
flex    torch's FlexAttention, compiled; CUDA, and inference on the CPU
natten  NATTEN's fused kernel; CUDA, needs the natten package

`LEDIFLOW_ATTENTION=name`, or the argument `backend`, forces one.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lediflow.choices import ATTENTION_BACKENDS as BACKENDS
from lediflow.errors import UserError, nearest

P = ParamSpec("P")
R = TypeVar("R")

VARIABLE = "LEDIFLOW_ATTENTION"
TILED_FROM = 32 * 32  # tokens; below, a mask over the whole grid is faster
TILE = 8


def self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    kernel_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend with softmax(q k^T) v, scale 1 (queries and keys carry their own scale).

    Args:
        q: queries, (B, heads, H*W, d), tokens in row-major order of the grid.
        k: keys, same shape.
        v: values, same shape.
        grid: (H, W).
        kernel_size: odd side K of the neighbourhood; None for global attention.
        backend: one of `BACKENDS`; None for the environment variable LEDIFLOW_ATTENTION, or the best for
            this device and grid. Global attention is torch's own in any case.

    Returns:
        (B, heads, H*W, d).

    Raises:
        UserError: the backend is unknown, not installed, or has no derivative here.
    """
    chosen = choose_backend(grid, kernel_size, q.device, backend)
    if chosen == "global" or kernel_size is None:
        return _attend(q, k, v)
    check_backend(chosen)
    if chosen == "tiles":
        return tiled_attention(q, k, v, grid, kernel_size)
    if chosen == "flex":
        return _flex_attention(q, k, v, grid, kernel_size)
    if chosen == "natten":
        return _natten_attention(q, k, v, grid, kernel_size)
    return _attend(q, k, v, neighborhood_mask(grid, kernel_size, q.device))


def compile_time_constant(function: Callable[P, R]) -> Callable[P, R]:
    """Cache a function of sizes, devices and names; torch.compile takes its result as a constant.

    Traced instead, its few hundred small operations would run again in every block of every evaluation.
    """
    cached = lru_cache(maxsize=64)(function)

    @torch.compiler.assume_constant_result
    def boxed(*args: Any, **kwargs: Any) -> tuple[R]:
        # what is first made in inference mode could not be used in training afterwards, and what a transform
        # of torch.func wrapped would outlive it; flex needs such transforms, but not in forward mode
        with torch.inference_mode(False):
            if _forward_mode:
                with torch._C._DisableFuncTorch():
                    return (cached(*args, **kwargs),)
            return (cached(*args, **kwargs),)  # torch.compile fails at a second tensor that is not in a tuple

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return boxed(*args, **kwargs)[0]

    return call


# Which backend


def forced_backend() -> str | None:
    """Return the backend that LEDIFLOW_ATTENTION names, if it names one."""
    return os.environ.get(VARIABLE) or None


_forward_mode = False


@contextmanager
def forward_mode() -> Iterator[None]:
    """Compute all attention by products and a softmax, whose derivative in forward mode torch knows.

    Fused kernels have none, so flex and natten, where they were forced, are replaced with a warning.
    """
    global _forward_mode
    outer, _forward_mode = _forward_mode, True
    try:
        yield
    finally:
        _forward_mode = outer


def choose_backend(
    grid: tuple[int, int], kernel_size: int | None, device: torch.device, backend: str | None = None
) -> str:
    """Return what computes the attention of a grid: "global", or one of `BACKENDS`, forced or the best."""
    if kernel_size is None or min(grid) < kernel_size or max(grid) == kernel_size:
        return "global"
    wanted = backend or forced_backend()
    if not _forward_mode:
        return wanted or best_backend(grid, device)
    if wanted in ("flex", "natten"):
        warnings.warn(
            f"attention backend {wanted!r} has no derivative in forward mode; where an average velocity "
            "needs one, attention is computed explicitly",
            stacklevel=2,
        )
    elif wanted:
        return wanted
    return "dense" if grid[0] * grid[1] < TILED_FROM else "tiles"


def best_backend(grid: tuple[int, int], device: torch.device) -> str:
    """Return the backend for a grid that is longer than the kernel, on a device."""
    if grid[0] * grid[1] < TILED_FROM:
        return "dense"
    if device.type == "cuda":
        for name in ("natten", "flex"):
            if missing_package(name) is None:
                return name
    return "tiles"


@compile_time_constant
def missing_package(backend: str) -> str | None:
    """Return the package that the backend needs and that is not installed, if any."""
    package = {"natten": "natten", "flex": "triton" if torch.cuda.is_available() else None}.get(backend)
    return package if package and importlib.util.find_spec(package) is None else None


def check_backend(name: str | None) -> None:
    """Refuse a backend that cannot be used; None is always right.

    Raises:
        UserError: the name is unknown, or its package is missing.
    """
    if name is None:
        return
    if name not in BACKENDS:
        raise UserError(
            f"unknown attention backend {name!r}{nearest(name, BACKENDS)}; choose from {', '.join(BACKENDS)}"
        )
    package = missing_package(name)
    if package is not None:
        raise UserError(
            f"attention backend {name!r} needs the package {package}, which is not installed here "
            f"(pip install {'natten>=0.21' if package == 'natten' else package}); leave {VARIABLE} unset to "
            "use what there is"
        )


def attend_beside(q: Tensor, k: Tensor, v: Tensor, further: tuple[Tensor, Tensor], there: Tensor) -> Tensor:
    """Attend globally, and besides to further keys that are no patches.

    Args:
        q: queries, (B, heads, H*W, d).
        k: keys, same shape.
        v: values, same shape.
        further: keys and values, (B, heads, L, d) each.
        there: which of them there are, bool (B, L).

    Returns:
        (B, heads, H*W, d).
    """
    mask = torch.cat((there.new_ones(len(there), k.shape[2]), there), dim=1)[:, None, None]
    return _attend(q, torch.cat((k, further[0]), dim=2), torch.cat((v, further[1]), dim=2), mask)


# Dense: one attention under a mask


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    if _forward_mode or _explicit_is_faster(q, k):
        return _explicit_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


def _explicit_is_faster(q: Tensor, k: Tensor) -> bool:
    # on the CPU torch's fused attention loses while the scores of a head fit in the cache, and a little
    # longer where its bf16 backward is needed
    if q.device.type != "cpu":
        return False
    trains_in_bf16 = q.dtype == torch.bfloat16 and torch.is_grad_enabled()
    return q.shape[-2] * k.shape[-2] <= (2**18 if trains_in_bf16 else 2**16)


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    if mask is not None:
        # in place and additive: no copy here, and nothing to do in the backward
        hidden = torch.full(mask.shape, float("-inf"), dtype=q.dtype, device=q.device)
        scores += hidden.masked_fill_(mask, 0.0)
    return scores.softmax(-1).to(v.dtype) @ v


@compile_time_constant
def neighborhood_mask(grid: tuple[int, int], kernel_size: int, device: torch.device) -> Tensor:
    """Return the boolean (H*W, H*W) mask that is True where the row's query sees the column's key.

    Raises:
        ValueError: a side of the grid is shorter than the kernel.
    """
    if min(grid) < kernel_size:
        raise ValueError(f"grid {grid} has a side shorter than the neighbourhood kernel {kernel_size}")
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


# Tiles: linear in the tokens


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], kernel_size: int, tile: int = TILE
) -> Tensor:
    """Neighbourhood attention, one tile x tile square of queries at a time; arguments as `self_attention`.

    The work grows linearly with the tokens: a tile reads (tile + K - 1)^2 keys wherever it lies.
    """
    b, heads, _, d = q.shape
    queries, keys, mask, order = _tiles(grid, kernel_size, tile, q.device)

    def gather(x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(2, index.flatten()).view(b * heads, len(index), -1, d)

    parts = _parts(b * heads * mask.numel(), q.device)
    y = torch.cat(
        [
            _attend(gather(q, own), gather(k, reached), gather(v, reached), seen)
            for own, reached, seen in zip(*(u.chunk(parts) for u in (queries, keys, mask)), strict=True)
        ],
        dim=1,
    )
    return y.reshape(b, heads, -1, d).index_select(2, order)


def _parts(scores: int, device: torch.device) -> int:
    """In how many parts the tiles are worked on: many scores at once do not fit in a CPU's cache."""
    whole = device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling()
    return 1 if whole or scores < 2**23 else scores // 2**21


@compile_time_constant
def _tiles(
    grid: tuple[int, int], kernel_size: int, tile: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `tiled_attention` gathers, for all tiles in row-major order.

    Returns:
        Token indices of the queries (tiles, tile^2) and of the keys (tiles, reach^2), the mask
        (tiles, tile^2, reach^2), and where each token's result stands among the queries (H*W,).
    """
    (qy, ky, my), (qx, kx, mx) = (_axis_tiles(n, kernel_size, tile, device) for n in grid)

    def tokens(y: Tensor, x: Tensor) -> Tensor:
        return (y[:, None, :, None] * grid[1] + x[None, :, None, :]).reshape(len(y) * len(x), -1)

    mask = my[:, None, :, None, :, None] & mx[None, :, None, :, None, :]
    mask = mask.reshape(len(qy) * len(qx), tile**2, -1)
    queries = tokens(qy, qx)
    # a tile that overhangs the grid repeats the last token: any of its places holds the same result
    order = torch.empty(grid[0] * grid[1], dtype=torch.long, device=device)
    order[queries.flatten()] = torch.arange(queries.numel(), device=device)
    return queries, tokens(ky, kx), mask, order


def _axis_tiles(n: int, kernel_size: int, tile: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One axis of length n: positions of queries (tiles, tile) and keys (tiles, reach), and their mask."""
    first = torch.arange(0, n, tile, device=device)
    queries = (first[:, None] + torch.arange(tile, device=device)).clamp_max(n - 1)
    reach = min(n, tile + kernel_size - 1)
    start = (first - kernel_size // 2).clamp(0, n - reach)
    keys = start[:, None] + torch.arange(reach, device=device)
    return queries, keys, _seen(queries, keys, n, kernel_size)


# FlexAttention and NATTEN


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], kernel_size: int) -> Tensor:
    if q.device.type == "cpu" and torch.is_grad_enabled() and (q.requires_grad or v.requires_grad):
        raise UserError(
            "attention backend 'flex' has no backward on the CPU; use 'dense' or 'tiles' to train"
        )
    mask = _block_mask(grid, kernel_size, q.device)
    return _flex()(q.contiguous(), k.contiguous(), v.contiguous(), block_mask=mask, scale=1.0)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex() -> Any:
    if torch.compiler.is_compiling():  # it becomes part of the graph that is being made
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention
    return _compiled_flex()


def _block_mask(grid: tuple[int, int], kernel_size: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    n = grid[0] * grid[1]
    # torch.compile cannot guard the constants themselves inside from_kv_blocks
    tables = [table.clone() for table in _blocks(grid, kernel_size, device)]
    return BlockMask.from_kv_blocks(*tables, mask_mod=_window(grid, kernel_size), seq_lengths=(n, n))


@compile_time_constant
def _blocks(grid: tuple[int, int], kernel_size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Which blocks of 128 keys each block of 128 queries sees, partly and wholly: counts and indices."""
    from torch.nn.attention.flex_attention import create_block_mask

    n = grid[0] * grid[1]
    mask = create_block_mask(_window(grid, kernel_size), None, None, n, n, device=device)
    return mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices


def _window(grid: tuple[int, int], kernel_size: int) -> Callable[..., Tensor]:
    h, w = grid
    half = kernel_size // 2

    def sees(_b: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        top = (query // w - half).clamp(0, h - kernel_size)
        left = (query % w - half).clamp(0, w - kernel_size)
        y, x = key // w, key % w
        return (y >= top) & (y < top + kernel_size) & (x >= left) & (x < left + kernel_size)

    return sees


def _natten_attention(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], kernel_size: int) -> Tensor:
    from natten import na2d

    # NATTEN wants (B, H, W, heads, d), which is how the projections made them
    b, heads, n, d = q.shape
    q, k, v = (u.transpose(1, 2).reshape(b, *grid, heads, d) for u in (q, k, v))
    return na2d(q, k, v, kernel_size=kernel_size, scale=1.0).reshape(b, n, heads, d).transpose(1, 2)
