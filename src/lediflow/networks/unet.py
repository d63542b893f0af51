"""VelocityUNet: v_t(phi_t(x) | conditions) by convolutions, the coupling flow's (arXiv 2312.07360, Table 8).

The U-Net of guided diffusion (arXiv 2105.05233): residual blocks whose norms are scaled and shifted by the
time, attention in the coarse levels only, skips by concatenation. Unlike HDiT it has no positions, so it
works at other sizes than it was trained at. Everything is channels-first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from lediflow.conditions import NOTHING, Conditions
from lediflow.errors import UserError
from lediflow.networks.attention import self_attention
from lediflow.networks.conditions import ConditionEmbedders
from lediflow.networks.hourglass import linear, pair, token_grid
from lediflow.networks.model import Network
from lediflow.networks.velocity import IntervalFeatures, check_interval


class VelocityUNet(Network, ModelMixin, ConfigMixin):
    """U-Net that predicts a velocity from a point of the path, its time, and named conditions.

    Args:
        sample_size: side of the images (or codec latents) that it is trained on, or (H, W); others work too.
        in_channels: of the images, and of the velocity.
        base_width: channels of the first level, a multiple of 32.
        multipliers: width of each level as a multiple of `base_width`, finest first.
        depth: residual blocks of a level on the way down; on the way up there is one more.
        attention_factors: attention in the levels that are this many times coarser than the sample.
        heads: of the attention, in every level.
        d_head: width of each.
        conditions: what the network is told besides x and t, and how each is embedded (see
            `networks.conditions`); None for nothing.
        time_scale: t times this goes into sinusoids; 1 as in fm-boosting, 1000 as in diffusion models.
        average_velocity: as for `VelocityTransformer`.

    Raises:
        UserError: sizes that do not fit each other, by name.
    """

    _repeated_blocks = ["ResidualBlock"]  # noqa: RUF012  read by diffusers
    gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 128,
        in_channels: int = 4,
        base_width: int = 128,
        multipliers: Sequence[int] = (1, 2, 3, 4),
        depth: int = 3,
        attention_factors: Sequence[int] = (8, 16),
        heads: int = 4,
        d_head: int = 64,
        conditions: Mapping[str, Mapping[str, Any]] | None = None,
        time_scale: float = 1.0,
        average_velocity: bool = False,
    ):
        super().__init__()
        if base_width % GROUPS:
            raise UserError(f"VelocityUNet: base_width must be divisible by {GROUPS}, not {base_width}")
        if not multipliers or depth < 1:
            raise UserError("VelocityUNet: needs at least one multiplier and a depth of at least 1")
        token_grid(sample_size, 1, len(multipliers) - 1, "VelocityUNet")
        self.average_velocity, self.merges = average_velocity, len(multipliers) - 1
        time_width, widths = 4 * base_width, [base_width * m for m in multipliers]

        self.embedders = ConditionEmbedders(conditions or {}, time_width, pair(sample_size))
        self.time_features = Sinusoids(base_width, time_scale)
        self.time_in, self.time_out = nn.Linear(base_width, time_width), nn.Linear(time_width, time_width)
        if average_velocity:
            self.interval_features = IntervalFeatures(base_width)
            self.interval_in = linear(base_width, time_width, zero=True)

        def block(n_in: int, level: int) -> UNetBlock:
            attends = 2**level in attention_factors
            return UNetBlock(n_in, widths[level], time_width, heads if attends else 0, d_head)

        self.conv_in = nn.Conv2d(in_channels + self.embedders.features, base_width, 3, padding=1)
        levels, skips = range(len(widths)), [base_width]  # widths of what goes across
        self.down, self.merge = nn.ModuleList(), nn.ModuleList()
        for i in levels:
            width = widths[i]
            self.down.append(nn.ModuleList(block(skips[-1] if j == 0 else width, i) for j in range(depth)))
            skips += [width] * depth
            if i < levels[-1]:
                self.merge.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle = nn.ModuleList(
            UNetBlock(width, width, time_width, heads=n, d_head=d_head) for n in (heads, 0)
        )
        self.up, self.split = nn.ModuleList(), nn.ModuleList()
        for i in reversed(levels):
            blocks = []
            for _ in range(depth + 1):
                blocks.append(block(width + skips.pop(), i))
                width = widths[i]
            self.up.append(nn.ModuleList(blocks))
            if i:
                self.split.append(nn.Conv2d(width, width, 3, padding=1))
        self.out_norm = norm(width)
        self.conv_out = zeroed(nn.Conv2d(width, in_channels, 3, padding=1))

    def forward(
        self, x: Tensor, t: Tensor, conditions: Conditions = NOTHING, r: Tensor | None = None
    ) -> Tensor:
        """Predict the velocity at the point x = phi_t, or the average velocity from there to time r.

        Args:
            x: point of the path, (B, C, H, W), sides multiples of 2 ** (number of levels - 1).
            t: times in [0, 1], (B,) or a scalar.
            conditions: those that the network has, a row for each image, grids of the size of x.
            r: end of the interval, at least t, shape of t; None for r = t, which is the velocity itself.

        Returns:
            v, or u for an r, shape and dtype of x; bf16 weights compute in bf16 whatever x is.

        Raises:
            UserError: a side of x that the levels cannot halve.
            ValueError: as for `VelocityTransformer.forward`.
        """
        if r is not None:
            check_interval(self, t, r)
        token_grid(x.shape[2:], 1, self.merges, "VelocityUNet")
        dtype = self.conv_in.weight.dtype
        beside, vectors = self.embedders(conditions, x.movedim(1, -1).to(dtype))
        time = F.silu(sum(vectors, self._embed_times(t, r)))
        h = self.conv_in(torch.cat((x.to(dtype), *(grid.movedim(-1, 1) for grid in beside)), dim=1))
        skips = [h]
        for i, level in enumerate(self.down):
            for block in level:
                skips.append(h := self._run(block, h, time))
            if i < self.merges:
                skips.append(h := self.merge[i](h))
        for block in self.middle:
            h = self._run(block, h, time)
        for i, level in enumerate(self.up):
            for block in level:
                h = self._run(block, torch.cat((h, skips.pop()), dim=1), time)
            if i < self.merges:
                h = self.split[i](F.interpolate(h, scale_factor=2, mode="nearest"))
        return self.conv_out(F.silu(self.out_norm(h))).to(x.dtype)

    def _embed_times(self, t: Tensor, r: Tensor | None) -> Tensor:
        """A vector for t and r - t, (B, time_width), or (1, ...) where all images share them."""
        dtype = self.time_in.weight.dtype
        embedded = self.time_out(F.silu(self.time_in(self.time_features(t.reshape(-1)).to(dtype))))
        if r is not None:
            embedded = embedded + self.interval_in(self.interval_features((r - t).reshape(-1)).to(dtype))
        return embedded

    def _run(self, block: nn.Module, h: Tensor, time: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, h, time)
        return block(h, time)


# The parts


GROUPS = 32


def norm(width: int) -> nn.GroupNorm:
    """Group norm of 32 groups."""
    return nn.GroupNorm(GROUPS, width)


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """Set a layer to zero, which must not act at the start of training."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class UNetBlock(nn.Module):
    """A residual block, and attention where there are heads."""

    def __init__(self, n_in: int, n_out: int, time_width: int, heads: int, d_head: int):
        super().__init__()
        self.residual = ResidualBlock(n_in, n_out, time_width)
        self.attention = Attention(n_out, heads, d_head) if heads else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, n_in, H, W) -> (B, n_out, H, W)."""
        return self.attention(self.residual(x, time))


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(h) * (1 + scale) + shift)), h = conv(silu(norm(x))); scale and shift of the time."""

    def __init__(self, n_in: int, n_out: int, time_width: int):
        super().__init__()
        self.in_norm, self.in_conv = norm(n_in), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.time = nn.Linear(time_width, 2 * n_out)
        self.out_norm, self.out_conv = norm(n_out), zeroed(nn.Conv2d(n_out, n_out, 3, padding=1))
        self.skip = nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, n_in, H, W) and (B or 1, time_width), activated -> (B, n_out, H, W)."""
        h = self.in_conv(F.silu(self.in_norm(x)))
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        h = self.out_norm(h) * (1 + scale) + shift
        return self.skip(x) + self.out_conv(F.silu(h))


class Attention(nn.Module):
    """Global attention, its heads' width independent of the level's: x + out(attention(norm(x)))."""

    def __init__(self, width: int, heads: int, d_head: int):
        super().__init__()
        self.heads, self.d_head = heads, d_head
        self.norm = norm(width)
        self.qkv = nn.Conv2d(width, 3 * heads * d_head, 1)
        self.out = zeroed(nn.Conv2d(heads * d_head, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, width, H, W)."""
        b, _, h, w = x.shape
        q, k, v = (
            part.reshape(b, self.heads, self.d_head, h * w).transpose(2, 3)
            for part in self.qkv(self.norm(x)).chunk(3, dim=1)
        )
        y = self_attention(q / math.sqrt(self.d_head), k, v, (h, w))
        return x + self.out(y.transpose(2, 3).reshape(b, -1, h, w))


class Sinusoids(nn.Module):
    """cos and sin of t f for frequencies f from 1 down to 1e-4, times `scale`."""

    frequencies: Tensor

    def __init__(self, width: int, scale: float):
        super().__init__()
        exponents = torch.arange(width // 2) / (width // 2)
        self.register_buffer("frequencies", scale * torch.exp(-math.log(1e4) * exponents))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        angles = t[:, None] * self.frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1)
