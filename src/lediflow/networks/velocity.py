"""VelocityTransformer: v_t(phi_t(x), z). It is theta_FM, the sampler theta_L, and plain flow matching."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from lediflow.errors import UserError
from lediflow.networks.hourglass import (
    FourierFeatures,
    Hourglass,
    MappingNetwork,
    RMSNorm,
    TokenSplit,
    check_widths,
    linear,
    pair,
    patchify,
    token_grid,
)
from lediflow.networks.model import Network


class VelocityTransformer(Network, ModelMixin, ConfigMixin):
    """HDiT that predicts a velocity from a point of the path, its time, and optionally z and a class.

    Args:
        sample_size: side of the images (or latents), or (H, W).
        in_channels: of the images (or latents).
        patch_size: side of the square of pixels that makes a token.
        widths: of the levels, finest first.
        depths: blocks per level.
        d_head: width of an attention head.
        ff_factor: d_ff = ff_factor * width.
        kernel_size: side of the neighbourhood, odd.
        global_levels: how many of the lowest levels attend globally.
        mapping_width: width of the condition vector.
        mapping_depth: blocks of the mapping network.
        latent_channels: channels of z; 0 for a network without z.
        latent_size: side of z, or (H, W).
        latent_conditioning: "concat" brings z to the grid of tokens and concatenates it to the patches;
            "mapping" adds a linear map of the flat z to the condition vector.
        num_classes: number of classes; 0 for a network without.
        time_bias: a bias in the embedding of t, which checkpoints of k-diffusion bring (kdiffusion.py).
        average_velocity: the network also takes the end r of an interval and predicts the average velocity
            u(x, t, r) over [t, r] (MeanFlow, arXiv 2505.13447). Untrained, u is v.

    Raises:
        UserError: sizes that do not fit each other, by name.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 32,
        in_channels: int = 3,
        patch_size: int = 4,
        widths: Sequence[int] = (256,),
        depths: Sequence[int] = (8,),
        d_head: int = 64,
        ff_factor: float = 3.0,
        kernel_size: int = 7,
        global_levels: int = 1,
        mapping_width: int = 256,
        mapping_depth: int = 2,
        latent_channels: int = 0,
        latent_size: int | Sequence[int] = 8,
        latent_conditioning: Literal["concat", "mapping"] = "concat",
        num_classes: int = 0,
        time_bias: bool = False,
        average_velocity: bool = False,
    ):
        super().__init__()
        name = type(self).__name__
        check_widths(widths, depths, d_head, kernel_size, name)
        grid = token_grid(sample_size, patch_size, len(widths) - 1, name)
        self.patch_size, self.num_classes = patch_size, num_classes
        self.average_velocity = average_velocity
        self.latent_conditioning = latent_conditioning if latent_channels else None
        self.latent_shape = (latent_channels, *pair(latent_size))

        extra = 0
        if self.latent_conditioning == "concat":
            extra = _latent_features(self.latent_shape, grid, name)
        self.patch_in = linear(in_channels * patch_size**2 + extra, widths[0])

        self.time_features = FourierFeatures(mapping_width)
        self.time_in = nn.Linear(mapping_width, mapping_width, bias=time_bias)
        if average_velocity:
            self.interval_features = IntervalFeatures(mapping_width)
            self.interval_in = linear(mapping_width, mapping_width, zero=True)
        if num_classes:
            self.class_embedding = nn.Embedding(num_classes + 1, mapping_width)  # the last row: no class
        if self.latent_conditioning == "mapping":
            self.latent_in = linear(
                self.latent_shape[0] * self.latent_shape[1] * self.latent_shape[2], mapping_width
            )
        self.mapping = MappingNetwork(mapping_width, mapping_depth, int(ff_factor * mapping_width))

        self.hourglass = Hourglass(
            widths,
            depths,
            ff_factor=ff_factor,
            d_head=d_head,
            cond_width=mapping_width,
            kernel_size=kernel_size,
            global_levels=global_levels,
        )
        self.out_norm = RMSNorm(widths[0])
        self.patch_out = TokenSplit(widths[0], in_channels, patch_size, zero=True)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        z: Tensor | None = None,
        class_labels: Tensor | None = None,
        r: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity at the point x = phi_t, or the average velocity from there to time r.

        Args:
            x: point of the path, (B, C, H, W).
            t: times in [0, 1], (B,) or a scalar.
            z: auxiliary latent, (B, latent_channels, h, w), where the network has one.
            class_labels: integers in [0, num_classes], (B,), where the network has classes; num_classes
                itself stands for no class.
            r: end of the interval, at least t, shape of t; None for r = t, which is the velocity itself.

        Returns:
            v, or u for an r, shape and dtype of x; bf16 weights compute in bf16 whatever x is.

        Raises:
            ValueError: z or class_labels missing where the network needs them, or given where it has none; or
                r for a network without average velocity; or an r before its t (not looked at on a GPU, which
                would have to be waited for).
        """
        if (z is None) != (self.latent_conditioning is None):
            raise ValueError(f"this network {'needs' if z is None else 'has no'} z")
        if (class_labels is None) != (self.num_classes == 0):
            raise ValueError(f"this network {'needs' if class_labels is None else 'has no'} class_labels")

        if r is not None:
            self._check_interval(t, r)

        tokens = self._tokens(x, z)
        cond = self._condition(t, z, class_labels, r)
        tokens = self.hourglass(self.patch_in(tokens), cond)
        return self.patch_out(self.out_norm(tokens)).movedim(-1, 1).to(x.dtype)

    def _check_interval(self, t: Tensor, r: Tensor) -> None:
        if not self.average_velocity:
            raise ValueError("this network has no average velocity, so it takes no r")
        if r.device.type == "cpu" and not torch.compiler.is_compiling() and bool((r < t).any()):
            raise ValueError("r must be at least t: the average velocity leads from the source to the data")

    def _tokens(self, x: Tensor, z: Tensor | None) -> Tensor:
        tokens = patchify(x.movedim(1, -1).to(self.patch_in.weight.dtype), self.patch_size)
        if z is not None and self.latent_conditioning == "concat":
            tokens = torch.cat((tokens, _latent_tokens(z, tokens)), dim=-1)
        return tokens

    def _condition(
        self, t: Tensor, z: Tensor | None, class_labels: Tensor | None, r: Tensor | None
    ) -> Tensor:
        """The vector that scales every norm, (B, mapping_width), or (1, ...) where all images share it."""
        dtype = self.time_in.weight.dtype
        cond = self.time_in(self.time_features(t.reshape(-1)).to(dtype))
        if r is not None:
            cond = cond + self.interval_in(self.interval_features((r - t).reshape(-1)).to(dtype))
        if class_labels is not None:
            cond = cond + self.class_embedding(class_labels)
        if z is not None and self.latent_conditioning == "mapping":
            cond = cond + self.latent_in(z.flatten(1).to(dtype))
        return self.mapping(cond)


class IntervalFeatures(nn.Module):
    """sin and cos - 1 of 2 pi f s for low frequencies f: all 0 at s = 0, where u is v.

    The correction of the average velocity contains the derivative of these features, which is large for high
    frequencies whatever the network has learned.
    """

    frequencies: Tensor

    def __init__(self, width: int, lowest: float = 0.05, highest: float = 0.6):
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(lowest, highest, width // 2))

    def forward(self, s: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        angles = 2 * math.pi * s[:, None] * self.frequencies
        return torch.cat((angles.sin(), angles.cos() - 1), dim=-1)


def _latent_features(latent_shape: tuple[int, int, int], grid: tuple[int, int], name: str) -> int:
    """Features that z adds to each token, for a latent grid coarser or finer than the grid of tokens."""
    c, h, w = latent_shape
    if grid[0] % h == 0 and grid[1] % w == 0:
        return c
    if h % grid[0] == 0 and w % grid[1] == 0 and h // grid[0] == w // grid[1]:
        return c * (h // grid[0]) ** 2
    raise UserError(
        f"{name}: z of {h}x{w} does not fit a grid of {grid[0]}x{grid[1]} tokens; "
        "one must be a multiple of the other (change latent_size or patch_size)"
    )


def _latent_tokens(z: Tensor, tokens: Tensor) -> Tensor:
    """Bring z (B, c, h, w) to the grid of tokens (B, H, W, ...): repeat when coarser, patchify when finer."""
    z = z.movedim(1, -1).to(tokens.dtype)
    h, w = tokens.shape[1:3]
    if z.shape[1] > h:
        return patchify(z, z.shape[1] // h)
    return z.repeat_interleave(h // z.shape[1], dim=1).repeat_interleave(w // z.shape[2], dim=2)
