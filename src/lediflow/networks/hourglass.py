"""HDiT, the hourglass diffusion transformer (arXiv 2401.11605), from its smallest part to the whole.

Everything is channels-last: tokens are (B, H, W, width). Every linear is bias-free. What must start as the
identity starts at zero: attention output, feed-forward output, adaptive scales, patch output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lediflow.errors import UserError
from lediflow.networks.attention import attend_beside, check_backend, forced_backend, self_attention
from lediflow.networks.model import Network
from lediflow.networks.positions import rope_table, rotate

EPS = 1e-6


def linear(n_in: int, n_out: int, *, zero: bool = False) -> nn.Linear:
    """Return a bias-free linear layer, at zero when it must not act at the start of training."""
    layer = nn.Linear(n_in, n_out, bias=False)
    if zero:
        nn.init.zeros_(layer.weight)
    return layer


def mean_square(x: Tensor) -> Tensor:
    """Mean of squares over the last axis in fp32 or finer, kept as an axis of size 1."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square() / x.shape[-1]


class RMSNorm(nn.Module):
    """x / rms(x) * scale; the scale is learned, or 1 + Linear(cond) when there is a condition.

    Args:
        width: size of the last axis.
        cond_width: size of the condition; 0 for a plain learned scale.
    """

    def __init__(self, width: int, cond_width: int = 0):
        super().__init__()
        self.adaptive = cond_width > 0
        if self.adaptive:
            self.linear = linear(cond_width, width, zero=True)
        else:
            self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Normalise x (B, ..., width); an adaptive norm takes cond, (B or 1, cond_width)."""
        if self.adaptive:
            scale = 1 + self.linear(cond)
            scale = scale.reshape(scale.shape[0], *[1] * (x.ndim - 2), -1)
        else:
            scale = self.scale
        return x * (scale * torch.rsqrt(mean_square(x) + EPS)).to(x.dtype)


class GEGLU(nn.Module):
    """Feed-forward: down(a * gelu(gate)) with (a, gate) = up(x); `down` starts at zero."""

    def __init__(self, width: int, d_ff: int):
        super().__init__()
        self.up = linear(width, 2 * d_ff)
        self.down = linear(d_ff, width, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        a, gate = self.up(x).chunk(2, dim=-1)
        return self.down(a * F.gelu(gate))


# Blocks


class Words(NamedTuple):
    """Tokens of a text, which patches attend to beside each other.

    Attributes:
        tokens: (B, L, words_width).
        there: which of them there are, bool (B, L).
    """

    tokens: Tensor
    there: Tensor


class SelfAttention(nn.Module):
    """Cosine attention: unit queries and keys, each times sqrt(s) with s learned per head (init 10).

    Args:
        width: of the tokens.
        d_head: of a head.
        kernel_size: of the neighbourhood; None for global attention.
        words_width: of the tokens of a text that global attention looks at too; 0 for none.

    Attributes:
        trained_side: as for `rope_table`.
    """

    trained_side: int | None = None

    def __init__(self, width: int, d_head: int, kernel_size: int | None, words_width: int = 0):
        super().__init__()
        self.n_heads, self.d_head, self.kernel_size = width // d_head, d_head, kernel_size
        self.qkv = linear(width, 3 * width)
        self.scale = nn.Parameter(torch.full([self.n_heads], 10.0))
        self.out = linear(width, width, zero=True)
        if words_width:
            self.words_kv = linear(words_width, 2 * width)

    def forward(self, x: Tensor, words: Words | None = None) -> Tensor:
        """(B, H, W, width) -> (B, H, W, width)."""
        b, h, w = x.shape[0], index(x.shape[1]), index(x.shape[2])  # a compiled graph is made for one grid
        q, k, v = self.qkv(x).view(b, h * w, 3, self.n_heads, self.d_head).unbind(2)
        root = self.scale.sqrt()[:, None]
        cos, sin = rope_table((h, w), self.n_heads, self.d_head, x.device, q.dtype, self.trained_side)
        q, k = (rotate(unit(u, root), cos, sin) for u in (q, k))
        q, k, v = (u.transpose(1, 2) for u in (q, k, v))  # (B, heads, H*W, d_head)
        if words is None:
            y = self_attention(q, k, v, (h, w), self.kernel_size)
        else:
            told = self.words_kv(words.tokens).unflatten(-1, (2, self.n_heads, self.d_head))
            word_k, word_v = told.unbind(2)  # words have no place in the image, so nothing is rotated
            further = unit(word_k, root).transpose(1, 2), word_v.transpose(1, 2)
            y = attend_beside(q, k, v, further, words.there)
        return self.out(y.transpose(1, 2).reshape(b, h, w, -1))


def unit(x: Tensor, scale: Tensor) -> Tensor:
    """Return x (B, N, n_heads, d_head) with length `scale`, (n_heads, 1), in each head."""
    return x * (scale * torch.rsqrt(mean_square(x) * x.shape[-1] + EPS)).to(x.dtype)


class Block(nn.Module):
    """Transformer block: x + attention(norm(x, cond)), then x + feed_forward(norm(x, cond))."""

    def __init__(
        self,
        width: int,
        d_ff: int,
        d_head: int,
        cond_width: int,
        kernel_size: int | None,
        words_width: int = 0,
    ):
        super().__init__()
        self.attention_norm = RMSNorm(width, cond_width)
        self.attention = SelfAttention(width, d_head, kernel_size, words_width)
        self.feed_forward_norm = RMSNorm(width, cond_width)
        self.feed_forward = GEGLU(width, d_ff)

    def forward(self, x: Tensor, cond: Tensor | None = None, words: Words | None = None) -> Tensor:
        """(B, H, W, width) -> (B, H, W, width)."""
        x = x + self.attention(self.attention_norm(x, cond), words)
        return x + self.feed_forward(self.feed_forward_norm(x, cond))


class Level(nn.ModuleList):
    """Blocks that work on one grid; `enable_gradient_checkpointing` of the model sets the flag."""

    gradient_checkpointing = False

    def forward(self, x: Tensor, cond: Tensor | None = None, words: Words | None = None) -> Tensor:
        """(B, H, W, width) -> (B, H, W, width)."""
        for block in self:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, cond, words)
            else:
                x = block(x, cond, words)
        return x


# Conditions


class MappingNetwork(nn.Module):
    """Turns the sum of the condition embeddings into the vector that scales every norm."""

    def __init__(self, width: int, depth: int, d_ff: int):
        super().__init__()
        self.in_norm = RMSNorm(width)
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(depth))
        self.blocks = nn.ModuleList(GEGLU(width, d_ff) for _ in range(depth))
        self.out_norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> (B, width)."""
        x = self.in_norm(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.out_norm(x)


class FourierFeatures(nn.Module):
    """cos and sin of 2 pi f s for random frequencies f ~ N(0, 1), kept as a buffer."""

    frequencies: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width // 2))

    def forward(self, s: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        angles = 2 * math.pi * s[:, None] * self.frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


# From pixels to tokens, between levels, and back


def patchify(x: Tensor, p: int) -> Tensor:
    """(B, H, W, C) -> (B, H/p, W/p, p*p*C)."""
    b, h, w, c = x.shape
    return x.view(b, h // p, p, w // p, p, c).transpose(2, 3).reshape(b, h // p, w // p, p * p * c)


def unpatchify(x: Tensor, p: int) -> Tensor:
    """(B, H, W, p*p*C) -> (B, H*p, W*p, C), the inverse of `patchify`."""
    b, h, w, c = x.shape
    return x.view(b, h, w, p, p, c // p**2).transpose(2, 3).reshape(b, h * p, w * p, c // p**2)


class TokenMerge(nn.Module):
    """Join p x p tokens into one: (B, H, W, n_in) -> (B, H/p, W/p, n_out)."""

    def __init__(self, n_in: int, n_out: int, p: int = 2):
        super().__init__()
        self.p = p
        self.proj = linear(n_in * p**2, n_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, n_in) -> (B, H/p, W/p, n_out)."""
        return self.proj(patchify(x, self.p))


class TokenSplit(nn.Module):
    """Split each token into p x p: (B, H, W, n_in) -> (B, H*p, W*p, n_out)."""

    def __init__(self, n_in: int, n_out: int, p: int = 2, *, zero: bool = False):
        super().__init__()
        self.p = p
        self.proj = linear(n_in, n_out * p**2, zero=zero)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, n_in) -> (B, H*p, W*p, n_out)."""
        return unpatchify(self.proj(x), self.p)


class SkipLerp(nn.Module):
    """lerp(skip, x, f) with one learned scalar f, 0.5 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full([1], 0.5))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Both (B, H, W, width)."""
        return torch.lerp(skip, x, self.factor.to(x.dtype))


class Hourglass(nn.Module):
    """Levels down, the lowest level, levels up with skips; tokens in and out have the first level's width.

    Args:
        widths: of the levels, finest first.
        depths: blocks per level; a level that is not the lowest has them on the way down and again up.
        ff_factor: d_ff = ff_factor * width.
        d_head: width of an attention head.
        cond_width: width of the condition vector, 0 for none.
        kernel_size: of neighbourhood attention.
        global_levels: how many of the lowest levels have global attention.
        words_width: of the tokens of a text that the lowest level attends to; 0 for none.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        *,
        ff_factor: float,
        d_head: int,
        cond_width: int,
        kernel_size: int,
        global_levels: int = 1,
        words_width: int = 0,
    ):
        super().__init__()
        kernels = level_kernels(len(depths), kernel_size, global_levels)

        def level(i: int, words_width: int = 0) -> Level:
            return Level(
                Block(widths[i], int(ff_factor * widths[i]), d_head, cond_width, kernels[i], words_width)
                for _ in range(depths[i])
            )

        upper = range(len(depths) - 1)
        self.down = nn.ModuleList(level(i) for i in upper)
        self.merges = nn.ModuleList(TokenMerge(widths[i], widths[i + 1]) for i in upper)
        self.middle = level(len(depths) - 1, words_width)
        self.splits = nn.ModuleList(TokenSplit(widths[i + 1], widths[i]) for i in upper)
        self.lerps = nn.ModuleList(SkipLerp() for _ in upper)
        self.up = nn.ModuleList(level(i) for i in upper)

    def forward(self, x: Tensor, cond: Tensor | None = None, words: Words | None = None) -> Tensor:
        """(B, H, W, widths[0]) -> the same shape; cond is (B, cond_width)."""
        skips = []
        for level, merge in zip(self.down, self.merges, strict=True):
            x = level(x, cond)
            skips.append(x)
            x = merge(x)
        x = self.middle(x, cond, words)
        for i in reversed(range(len(skips))):
            x = self.lerps[i](self.splits[i](x), skips[i])
            x = self.up[i](x, cond)
        return x


def level_kernels(n_levels: int, kernel_size: int, global_levels: int) -> list[int | None]:
    """Kernel of each level, finest first: neighbourhood attention, global in the lowest levels."""
    return [kernel_size if i < n_levels - global_levels else None for i in range(n_levels)]


# What a size must satisfy, and what the optimiser must know


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Return (H, W) of a size given as one number or as two."""
    if isinstance(size, int):
        return size, size
    h, w = size
    return int(h), int(w)


def token_grid(size: int | Sequence[int], patch_size: int, merges: int, name: str) -> tuple[int, int]:
    """Return the grid of tokens at the first level.

    Raises:
        UserError: a side is not divisible by patch_size * 2**merges; `name` says whose size it is.
    """
    h, w = pair(size)
    unit = patch_size * 2**merges
    if h % unit or w % unit or not h or not w:
        near = f"{max(1, round(h / unit)) * unit}x{max(1, round(w / unit)) * unit}"
        raise UserError(
            f"{name}: size {h}x{w} is not divisible by {unit} (patch {patch_size} and {merges} merges of 2); "
            f"the nearest size that is: {near}"
        )
    return h // patch_size, w // patch_size


def check_widths(
    widths: Sequence[int], depths: Sequence[int], d_head: int, kernel_size: int, name: str
) -> None:
    """Refuse level sizes that cannot be built.

    Raises:
        UserError: no level, lengths differ, heads do not divide a width, a head that rotary embeddings
            cannot split, an even kernel, or an attention backend that is not there.
    """
    if not depths or len(widths) != len(depths):
        raise UserError(f"{name}: needs one width for each depth, got widths {widths} and depths {depths}")
    if d_head % 8:
        raise UserError(f"{name}: d_head must be divisible by 8 (rotary embeddings), not {d_head}")
    for width in widths:
        if width % d_head:
            raise UserError(f"{name}: width {width} is not divisible by d_head {d_head}")
    if kernel_size % 2 == 0:
        raise UserError(f"{name}: kernel_size must be odd, not {kernel_size}")
    check_backend(forced_backend())


class HourglassNetwork(Network):
    """What networks made of these blocks tell the trainer."""

    _repeated_blocks = ["Block"]  # noqa: RUF012  read by diffusers

    def slow_parameters(self) -> Iterator[nn.Parameter]:
        """The mapping network and the adaptive scales, which HDiT trains at a third of the rate."""
        for module in self.modules():
            if isinstance(module, MappingNetwork) or (isinstance(module, RMSNorm) and module.adaptive):
                yield from module.parameters()
