"""More pictures from few: some are shifted, and their hues turned, and the network is told so.

A network that is told how its picture was changed learns from all of them and, asked for an unchanged one,
makes pictures without shifts and in the hues of the data (arXiv 2206.00364, F.2).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lediflow.sources import BatchNoise

if TYPE_CHECKING:
    from lediflow.training.couplings import Batch
    from lediflow.training.settings import AugmentConfig

NAME = "augmentation"  # of the condition
NUMBERS = 4  # mirrored, shift down, shift right, turn of the hue; all 0: the picture as it is


class Augmentation:
    """Changes a share of the pictures of a batch."""

    def __init__(self, settings: AugmentConfig):
        self.settings = settings

    def __call__(self, batch: Batch, noise: BatchNoise) -> Batch:
        """Return the batch with changed pictures, and what was done to them.

        Args:
            batch: with `image` (B, C, H, W) in [-1, 1] and `flipped` (B,).
            noise: of the step; what happens to a picture depends on the step and its place alone.

        Returns:
            The batch with `image`; `augmentation` (B, 4), what the network is told, in [-1, 1]; and
            `changed` (B,), whether a picture is another than its mirror.
        """
        y = batch["image"]
        changed = noise.uniform("augment") < self.settings.share
        down, right, turn = (
            (2 * noise.uniform(f"augment-{what}") - 1) * changed for what in ("down", "right", "hue")
        )
        reach = self.settings.shift * y.shape[-1]
        rows, columns = ((share * reach).round().long() for share in (down, right))
        moved = shift(y, rows, columns)
        if y.shape[1] == 3 and self.settings.hue:
            moved = turn_hue(moved, 2 * math.pi * self.settings.hue * turn)
        told = torch.stack((batch["flipped"].float(), down, right, turn), dim=1)
        image = torch.where(changed.view(-1, 1, 1, 1), moved, y)
        return {**batch, "image": image, NAME: told, "changed": changed}


def shift(y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Move pictures (B, C, H, W) down and right by whole pixels (B,); what comes in repeats the edge."""
    b, c, h, w = y.shape
    from_row = (torch.arange(h, device=y.device) - rows[:, None]).clamp(0, h - 1)
    from_column = (torch.arange(w, device=y.device) - columns[:, None]).clamp(0, w - 1)
    y = y.gather(2, from_row[:, None, :, None].expand(b, c, h, w))
    return y.gather(3, from_column[:, None, None, :].expand(b, c, h, w))


def turn_hue(y: Tensor, angle: Tensor) -> Tensor:
    """Turn RGB (B, 3, H, W) in [-1, 1] about the grey axis by angles (B,) in radians; greys stay."""
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None] / math.sqrt(3)
    across = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]], device=y.device)
    turn = cos * torch.eye(3, device=y.device) + (1 - cos) / 3 + sin * across  # Rodrigues' formula
    return torch.einsum("bij,bjhw->bihw", turn, y).clamp(-1, 1)
