"""UpsamplingPrior: a low-resolution sample -> a Gaussian for each high-resolution element."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from lediflow.gaussian import DiagonalGaussian
from lediflow.networks.auxiliary import PRIOR_LOG_VAR, soft_clamp
from lediflow.networks.hourglass import token_grid
from lediflow.networks.model import Network
from lediflow.networks.unet import zeroed


class UpsamplingPrior(Network, ModelMixin, ConfigMixin):
    """mu = the enlarged sample + a correction, and sigma; small, for all but its ends is low resolution.

    Args:
        sample_size: side of what it is trained on, or (H, W); any multiple of `scale` works.
        in_channels: of the sample.
        scale: times that each side has grown.
        width: channels.
        depth: residual blocks.

    Raises:
        UserError: a size that is no multiple of the scale.
    """

    _repeated_blocks = ["ConvBlock"]  # noqa: RUF012  read by diffusers
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 128,
        in_channels: int = 3,
        scale: int = 4,
        width: int = 64,
        depth: int = 4,
    ):
        super().__init__()
        token_grid(sample_size, scale, 0, "UpsamplingPrior")
        self.scale = scale
        self.conv_in = nn.Conv2d(in_channels * scale**2, width, 3, padding=1)
        self.blocks = nn.ModuleList(ConvBlock(width) for _ in range(depth))
        self.conv_out = zeroed(nn.Conv2d(width, 2 * in_channels * scale**2, 3, padding=1))

    def forward(self, image: Tensor) -> DiagonalGaussian:
        """Return the start of the flow for the enlarged sample (B, C, H, W): mean and log-variance, fp32.

        Raises:
            UserError: a side is no multiple of the scale.
        """
        token_grid(image.shape[2:], self.scale, 0, "UpsamplingPrior")
        h = self.conv_in(F.pixel_unshuffle(image.to(self.conv_in.weight.dtype), self.scale))
        for block in self.blocks:
            h = block(h)
        change, log_var = F.pixel_shuffle(self.conv_out(h), self.scale).float().chunk(2, dim=1)
        return DiagonalGaussian(image.float() + change, soft_clamp(log_var, *PRIOR_LOG_VAR))


class ConvBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))); the last convolution starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.last = zeroed(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, width, H, W)."""
        return x + self.last(F.silu(self.first(F.silu(x))))
