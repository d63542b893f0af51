"""How far a measured number may be off by the luck of the draw: bootstrap intervals over images.

Efron, "Bootstrap methods: another look at the jackknife" (1979).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number and the interval that covers it in 95 of 100 draws of the images.

    Attributes:
        value: what was measured.
        low: lower end of the interval; the value itself without replicates.
        high: upper end.
    """

    value: float
    low: float
    high: float


def resampled(n: int, replicates: int, *, seed: int) -> Tensor:
    """Draw n of n images with replacement, `replicates` times.

    Returns:
        How often each image was drawn, (replicates, n), float64; each row sums to n.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(n, (replicates, n), generator=generator)
    ones = torch.ones(replicates, n, dtype=torch.float64)
    return torch.zeros(replicates, n, dtype=torch.float64).scatter_add_(1, draws, ones)


def estimate(
    value: float, replicates: Tensor, *, least: float = -torch.inf, most: float = torch.inf
) -> Estimate:
    """Return the value with its 95 % interval.

    The replicates are moved so that their mean is the value: a resampled set repeats images, so it lies
    farther from any reference than the set itself, and that shift is no uncertainty.

    Args:
        value: measured on all images.
        replicates: the same on resampled images, (R,); empty for no interval.
        least: smallest possible value, where the interval is cut.
        most: largest possible value.
    """
    if len(replicates) == 0:
        return Estimate(value, value, value)
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = (torch.quantile(replicates.double(), tails) - replicates.mean() + value).tolist()
    return Estimate(value, min(max(low, least), value), max(min(high, most), value))


def estimate_mean(values: Tensor, counts: Tensor, *, least: float = -torch.inf, most: float = torch.inf):
    """Return the mean of one number per image, (N,), as an :class:`Estimate`; counts (R, N)."""
    values = values.detach().to("cpu", torch.float64)
    return estimate(values.mean().item(), counts @ values / len(values), least=least, most=most)
