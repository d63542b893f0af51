"""The path between source and target, what is regressed on it, and how t is drawn.

x ~ P is a source sample, y ~ Q its target, t in [0, 1]. Numbers of equations are those of LeDiFlow
(arXiv 2505.20723); the path is that of rectified flow (arXiv 2209.03003).
"""

from __future__ import annotations

import torch
from torch import Tensor

SIGMA_MIN = 1e-3  # "clip the divider" below eq. 6: the weight of a pixel is at most 1000


def expand_t(t: Tensor, like: Tensor) -> Tensor:
    """Reshape t of shape (B,) to (B, 1, ..., 1), so that it broadcasts against `like`."""
    return t.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def phi(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Return the point phi_t(x) = (1 - t) x + t y of the straight path.

    Args:
        x: source samples, (B, ...).
        y: target samples, (B, ...).
        t: times in [0, 1], (B,).
    """
    t = expand_t(t, x)
    return (1 - t) * x + t * y


def velocity(x: Tensor, y: Tensor) -> Tensor:
    """Return v = y - x, the time derivative of `phi`: the regression target of eq. 2."""
    return y - x


def matching_loss(v_predicted: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Flow matching loss, eq. 2: mean over all elements of (v_theta - (y - x))^2, a scalar."""
    return (v_predicted - velocity(x, y)).square().mean()


def weighted_matching_loss(v_predicted: Tensor, x: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
    """Importance-weighted loss, eq. 6: mean of (v_theta - (y - x))^2 / max(sigma, 1e-3), a scalar.

    Args:
        v_predicted: the network's velocity, (B, C, H, W).
        x: samples of the learned prior, (B, C, H, W).
        y: targets, (B, C, H, W).
        sigma: standard deviation of the learned prior at each element, (B, C, H, W).
    """
    return ((v_predicted - velocity(x, y)).square() / sigma.clamp_min(SIGMA_MIN)).mean()


def stratified_t(batch_size: int, generator: torch.Generator | None = None, device=None) -> Tensor:
    """Draw t uniformly on [0, 1), one from each of `batch_size` equal strata, in random order; (B,).

    Every t alone is uniform; together they cover [0, 1) evenly, which lowers the variance of the loss.
    """
    offset = torch.rand(batch_size, generator=generator, device=device)
    stratum = torch.randperm(batch_size, generator=generator, device=device)
    # rounding may give exactly 1.0 in the last stratum: keep the interval half open
    return ((stratum + offset) / batch_size).clamp_max(1 - 2**-24)
