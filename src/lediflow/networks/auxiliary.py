"""AuxiliaryModel: image y -> q(z|y) (theta_E), and z -> the learned prior P_L of each pixel (theta_D)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from lediflow.errors import UserError
from lediflow.gaussian import DiagonalGaussian
from lediflow.networks.hourglass import (
    Block,
    HourglassNetwork,
    Level,
    MappingNetwork,
    RMSNorm,
    TokenMerge,
    TokenSplit,
    check_widths,
    level_kernels,
    linear,
    pair,
    patchify,
    token_grid,
    unpatchify,
)

POSTERIOR_LOG_VAR = (-12.0, 4.0)
PRIOR_LOG_VAR = (-9.0, 2.0)


def soft_clamp(x: Tensor, low: float, high: float) -> Tensor:
    """Keep x in (low, high) with a gradient everywhere; the identity far from both ends."""
    x = high - F.softplus(high - x)
    return low + F.softplus(x - low)


class AuxiliaryModel(HourglassNetwork, ModelMixin, ConfigMixin):
    """The regression model behind P_L = N(mu(z), sigma^2(z)), section 3.1 of the paper.

    The encoder merges tokens from level to level until their grid is that of z; levels beyond that stay on
    the grid of z. The decoder runs the same way back, without skips; z can also scale its norms, as the
    condition does in the flow's network.

    Args:
        sample_size: side of the images (or latents of a codec), or (H, W).
        in_channels: of the images.
        patch_size: side of the square of pixels that makes a token.
        widths: of the encoder's levels, finest first.
        depths: blocks per level of the encoder.
        decoder_widths: of the decoder's levels, finest first; None for the encoder's.
        decoder_depths: blocks per level of the decoder, finest first; None for the encoder's.
        d_head: width of an attention head.
        ff_factor: d_ff = ff_factor * width.
        kernel_size: side of the neighbourhood, odd.
        global_levels: how many of the coarsest levels attend globally.
        mapping_width: width of the vector through which z scales the decoder's norms; 0 for plain norms.
        mapping_depth: blocks of that mapping network.
        z_channels: channels of z.
        z_size: side of z, or (H, W).

    Raises:
        UserError: sizes that do not fit each other, by name.
    """

    z_mean: Tensor
    z_std: Tensor

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 32,
        in_channels: int = 3,
        patch_size: int = 2,
        widths: Sequence[int] = (128, 256, 256),
        depths: Sequence[int] = (1, 1, 1),
        decoder_widths: Sequence[int] | None = None,
        decoder_depths: Sequence[int] | None = None,
        d_head: int = 32,
        ff_factor: float = 3.0,
        kernel_size: int = 7,
        global_levels: int = 1,
        mapping_width: int = 0,
        mapping_depth: int = 0,
        z_channels: int = 4,
        z_size: int | Sequence[int] = 4,
    ):
        super().__init__()
        name = type(self).__name__
        decoder_widths = decoder_widths or widths
        decoder_depths = decoder_depths or depths
        check_widths(widths, depths, d_head, kernel_size, f"{name} encoder")
        check_widths(decoder_widths, decoder_depths, d_head, kernel_size, f"{name} decoder")
        merges = _count_merges(sample_size, patch_size, z_size, name)
        for side, count in (("encoder", len(widths)), ("decoder", len(decoder_widths))):
            if count <= merges:
                raise UserError(
                    f"{name} {side}: {merges} merges lead from the patches to z, which needs at least "
                    f"{merges + 1} levels, not {count} (add levels, or change patch_size or z_size)"
                )
        self.patch_size = patch_size
        self.z_shape = (z_channels, *pair(z_size))

        def levels(widths: Sequence[int], depths: Sequence[int], cond_width: int = 0) -> nn.ModuleList:
            kernels = level_kernels(len(widths), kernel_size, global_levels)
            return nn.ModuleList(
                Level(Block(width, int(ff_factor * width), d_head, cond_width, kernel) for _ in range(depth))
                for width, depth, kernel in zip(widths, depths, kernels, strict=True)
            )

        self.patch_in = linear(in_channels * patch_size**2, widths[0])
        self.encoder = levels(widths, depths)
        self.merges = nn.ModuleList(
            TokenMerge(a, b, 2 if i < merges else 1) for i, (a, b) in enumerate(pairwise(widths))
        )
        self.posterior_norm = RMSNorm(widths[-1])
        self.posterior_out = linear(widths[-1], 2 * z_channels)

        self.z_in = linear(z_channels, decoder_widths[-1])
        self.decoder = levels(decoder_widths, decoder_depths, mapping_width)
        self.mapping: nn.Module | None = None
        if mapping_width:
            self.mapping_in = linear(math.prod(self.z_shape), mapping_width)
            self.mapping = MappingNetwork(mapping_width, mapping_depth, int(ff_factor * mapping_width))
        self.splits = nn.ModuleList(
            TokenSplit(b, a, 2 if i < merges else 1) for i, (a, b) in enumerate(pairwise(decoder_widths))
        )
        self.prior_norm = RMSNorm(decoder_widths[0])
        self.prior_out = linear(decoder_widths[0], 2 * in_channels * patch_size**2, zero=True)

        # statistics of z over the training set, measured when the auxiliary stage ends
        self.register_buffer("z_mean", torch.zeros(1, z_channels, 1, 1))
        self.register_buffer("z_std", torch.ones(1, z_channels, 1, 1))

    def encode(self, y: Tensor) -> DiagonalGaussian:
        """Return q(z|y) for images y (B, C, H, W) in [-1, 1]: mean and log-variance (B, c, h, w), fp32."""
        x = self._encoded(y)
        mean, log_var = self._head(self.posterior_out, self.posterior_norm(x)).movedim(-1, 1).chunk(2, dim=1)
        return DiagonalGaussian(mean, soft_clamp(log_var, *POSTERIOR_LOG_VAR))

    def features(self, y: Tensor) -> Tensor:
        """Return features of images y (B, C, H, W), fp32 (B, D): mean and deviation of the last tokens."""
        tokens = self.posterior_norm(self._encoded(y)).flatten(1, 2).float()
        return torch.cat((tokens.mean(1), tokens.std(1)), dim=1)

    def _encoded(self, y: Tensor) -> Tensor:
        """The tokens of the encoder's last level, (B, h, w, width)."""
        x = self.patch_in(patchify(y.movedim(1, -1).to(self.patch_in.weight.dtype), self.patch_size))
        for i, level in enumerate(self.encoder):
            x = level(self.merges[i - 1](x) if i else x)
        return x

    def decode(self, z: Tensor) -> DiagonalGaussian:
        """Return the learned prior P_L (eq. 3) for z (B, c, h, w): mean and log-variance (B, C, H, W)."""
        z = z.to(self.z_in.weight.dtype)
        x = self.z_in(z.movedim(1, -1))
        cond = None if self.mapping is None else self.mapping(self.mapping_in(z.flatten(1)))
        for i in reversed(range(len(self.decoder))):
            x = self.decoder[i](x, cond)
            if i:
                x = self.splits[i - 1](x)
        # mean and log-variance of a pixel stand side by side in its patch
        out = unpatchify(self._head(self.prior_out, self.prior_norm(x)), self.patch_size)
        mean, log_var = out.movedim(-1, 1).chunk(2, dim=1)
        return DiagonalGaussian(mean, soft_clamp(log_var, *PRIOR_LOG_VAR))

    def forward(self, y: Tensor, noise: Tensor) -> tuple[DiagonalGaussian, DiagonalGaussian]:
        """Encode y, sample z with standard normal `noise` (B, c, h, w), decode; returns (q(z|y), P_L)."""
        posterior = self.encode(y)
        return posterior, self.decode(posterior.at(noise))

    def standardize(self, z: Tensor) -> Tensor:
        """Return z with mean 0 and standard deviation 1 per channel over the training set."""
        return (z - self.z_mean) / self.z_std

    def unstandardize(self, z: Tensor) -> Tensor:
        """Undo `standardize`."""
        return z * self.z_std + self.z_mean

    @staticmethod
    def _head(layer: nn.Linear, x: Tensor) -> Tensor:
        """Last linear in fp32: exp(-log_var) multiplies whatever bf16 would round."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), layer.weight.to(dtype))


def _count_merges(
    sample_size: int | Sequence[int], patch_size: int, z_size: int | Sequence[int], name: str
) -> int:
    """Number of 2x2 merges from the grid of patches to the grid of z."""
    grid = token_grid(sample_size, patch_size, 0, name)
    latent = pair(z_size)
    merges = (grid[0] // latent[0]).bit_length() - 1
    if (latent[0] << merges, latent[1] << merges) != grid:
        raise UserError(
            f"{name}: z of {latent[0]}x{latent[1]} cannot be reached from {grid[0]}x{grid[1]} tokens by 2x2 "
            "merges; change z_size, patch_size or the image size"
        )
    return merges
