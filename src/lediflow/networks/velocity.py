"""VelocityTransformer: v_t(phi_t(x) | conditions). It is theta_FM, theta_L, and plain flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from lediflow.conditions import NOTHING, Conditions
from lediflow.errors import UserError
from lediflow.networks.conditions import ConditionEmbedders
from lediflow.networks.embedders import IntervalFeatures
from lediflow.networks.hourglass import (
    FourierFeatures,
    Hourglass,
    HourglassNetwork,
    MappingNetwork,
    RMSNorm,
    TokenSplit,
    check_widths,
    linear,
    patchify,
    token_grid,
)


class VelocityTransformer(HourglassNetwork, ModelMixin, ConfigMixin):
    """HDiT that predicts a velocity from a point of the path, its time, and named conditions.

    Args:
        sample_size: side of the images (or codec latents, or z), or (H, W).
        in_channels: of the images (or codec latents, or z).
        patch_size: side of the square of pixels that makes a token.
        widths: of the levels, finest first.
        depths: blocks per level.
        d_head: width of an attention head.
        ff_factor: d_ff = ff_factor * width.
        kernel_size: side of the neighbourhood, odd.
        global_levels: how many of the lowest levels attend globally.
        mapping_width: width of the condition vector.
        mapping_depth: blocks of the mapping network.
        conditions: what the network is told besides x and t, and how each is embedded (see
            `networks.conditions`); None for nothing.
        time_bias: a bias in the embedding of t, which checkpoints of k-diffusion bring (kdiffusion.py).
        average_velocity: the network also takes the end r of an interval and predicts the average velocity
            u(x, t, r) over [t, r] (MeanFlow, arXiv 2505.13447). Untrained, u is v.
        any_size: made for other sizes than `sample_size` too: positions then tell how far tokens are apart,
            not where in the image they are.

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
        conditions: Mapping[str, Mapping[str, Any]] | None = None,
        time_bias: bool = False,
        average_velocity: bool = False,
        any_size: bool = False,
    ):
        super().__init__()
        name = type(self).__name__
        check_widths(widths, depths, d_head, kernel_size, name)
        grid = token_grid(sample_size, patch_size, len(widths) - 1, name)
        self.patch_size, self.average_velocity = patch_size, average_velocity

        self.embedders = ConditionEmbedders(conditions or {}, mapping_width, grid)
        words_width = self.embedders.words_width
        if words_width and global_levels < 1:
            raise UserError(
                f"{name}: the lowest level attends to the words of a text only where it is global; set its "
                "global_levels to 1 or more, or text.tokens=false"
            )
        self.patch_in = linear(in_channels * patch_size**2 + self.embedders.features, widths[0])

        self.time_features = FourierFeatures(mapping_width)
        self.time_in = nn.Linear(mapping_width, mapping_width, bias=time_bias)
        if average_velocity:
            self.interval_features = IntervalFeatures(mapping_width)
            self.interval_in = linear(mapping_width, mapping_width, zero=True)
        self.mapping = MappingNetwork(mapping_width, mapping_depth, int(ff_factor * mapping_width))

        self.hourglass = Hourglass(
            widths,
            depths,
            ff_factor=ff_factor,
            d_head=d_head,
            cond_width=mapping_width,
            kernel_size=kernel_size,
            global_levels=global_levels,
            words_width=words_width,
        )
        if any_size:
            keep_distances(self.hourglass, grid)
        self.out_norm = RMSNorm(widths[0])
        self.patch_out = TokenSplit(widths[0], in_channels, patch_size, zero=True)

    def forward(
        self, x: Tensor, t: Tensor, conditions: Conditions = NOTHING, r: Tensor | None = None
    ) -> Tensor:
        """Predict the velocity at the point x = phi_t, or the average velocity from there to time r.

        Args:
            x: point of the path, (B, C, H, W).
            t: times in [0, 1], (B,) or a scalar.
            conditions: those that the network has, a row for each image.
            r: end of the interval, at least t, shape of t; None for r = t, which is the velocity itself.

        Returns:
            v, or u for an r, shape and dtype of x; bf16 weights compute in bf16 whatever x is.

        Raises:
            ValueError: a condition is missing or unknown; or r for a network without average velocity; or an
                r before its t (not looked at on a GPU, which would have to be waited for).
        """
        if r is not None:
            check_interval(self, t, r)
        tokens = patchify(x.movedim(1, -1).to(self.patch_in.weight.dtype), self.patch_size)
        beside, vectors = self.embedders(conditions, tokens)
        if beside:
            tokens = torch.cat((tokens, *beside), dim=-1)
        cond = self.mapping(sum(vectors, self._embed_times(t, r)))
        tokens = self.hourglass(self.patch_in(tokens), cond, self.embedders.words(conditions))
        return self.patch_out(self.out_norm(tokens)).movedim(-1, 1).to(x.dtype)

    def _embed_times(self, t: Tensor, r: Tensor | None) -> Tensor:
        """A vector for t and r - t, (B, mapping_width), or (1, ...) where all images share them."""
        dtype = self.time_in.weight.dtype
        embedded = self.time_in(self.time_features(t.reshape(-1)).to(dtype))
        if r is not None:
            embedded = embedded + self.interval_in(self.interval_features((r - t).reshape(-1)).to(dtype))
        return embedded


def keep_distances(hourglass: Hourglass, grid: tuple[int, int]) -> None:
    """Let neighbours be as far apart in any grid as in this one, that of the first level in training."""
    levels = [*zip(hourglass.down, hourglass.up, strict=True), (hourglass.middle,)]
    for i, same_grid in enumerate(levels):
        for block in (block for level in same_grid for block in level):
            block.attention.trained_side = max(grid) // 2**i


def check_interval(network: Any, t: Tensor, r: Tensor) -> None:
    """Refuse an r that a network has no use for, or that lies before its t.

    Raises:
        ValueError: as said.
    """
    if not network.average_velocity:
        raise ValueError("this network has no average velocity, so it takes no r")
    if r.device.type == "cpu" and not torch.compiler.is_compiling() and bool((r < t).any()):
        raise ValueError("r must be at least t: the average velocity leads from the source to the data")
