"""The path between source and target, what is regressed on it, and how times are drawn.

x ~ P is a source sample, y ~ Q its target, t in [0, 1]. Numbers of equations are those of LeDiFlow
(arXiv 2505.20723); the path is that of rectified flow (arXiv 2209.03003). The average velocity u over an
interval [t, r] is that of MeanFlow (arXiv 2505.13447), whose path runs the other way, from noise at t = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


# The average velocity: (r - t) u(phi_t, t, r) is the way from t to r


def average_velocity_correction(
    u: Callable[[Tensor, Tensor], Tensor], point: Tensor, v: Tensor, t: Tensor, r: Tensor
) -> Tensor:
    """Return (r - t) (v . d_x u + d_t u): what the average velocity has over the velocity of its start.

    MeanFlow's identity (arXiv 2505.13447, eq. 6) for a path from the source at t = 0 to the data at t = 1:

        u(phi_t, t, r) = v + (r - t) d/dt u(phi_t, t, r)

    Differentiating (r - t) u = integral of v from t to r gives -u + (r - t) du/dt = -v. The derivative goes
    along the path with r held, by one pass in forward mode.

    Args:
        u: (point, t) -> u(point, t, r) for the r held, (B, ...).
        point: phi_t, (B, ...).
        v: the velocity there, (B, ...).
        t: starts in [0, 1], (B,).
        r: ends, (B,), at least t.

    Returns:
        (B, ...), without gradients; add v for the regression target.
    """
    with torch.no_grad():
        # copies: functorch does not take views that share memory with what it must not change
        inputs, tangents = (point.clone(), t.clone()), (v.clone(), torch.ones_like(t))
        _, derivative = torch.func.jvp(u, inputs, tangents)
    return expand_t(r - t, point) * derivative


def adaptive_loss(errors: Tensor, power: float, c: float = 1e-3) -> Tensor:
    """MeanFlow's robust loss: mean of q / (q + c)^power with the divisor held constant, a scalar.

    Args:
        errors: q, the mean squared error of each sample, (B,).
        power: 0 is the plain mean; towards 1 the samples with large errors count less (arXiv 2505.13447,
            eq. 22).
        c: keeps the divisor from 0.
    """
    return (errors / (errors.detach() + c) ** power).mean()


def draw_intervals(
    times: Tensor, others: Tensor, positions: Sequence[int], *, equal_share: float, end_share: float
) -> tuple[Tensor, Tensor, list[int]]:
    """Draw t <= r: r = t for one share of the samples, r = 1 for another, two sorted times for the rest.

    Which sample gets which kind depends on its position in the batch alone, evenly spread (multiples of the
    golden ratio), so that parts of a batch have the kinds of the whole and every batch as many of each.

    Args:
        times: uniform on [0, 1), (B,).
        others: uniform on [0, 1), (B,), independent of `times`.
        positions: of the samples in the whole batch.
        equal_share: of samples with r = t, which learn the ordinary velocity.
        end_share: of samples with r = 1.

    Returns:
        t and r, (B,) each, and the indices of the samples with r > t.
    """
    kinds = [(position * 0.6180339887498949) % 1 for position in positions]
    still = times.new_tensor([kind < equal_share for kind in kinds], dtype=torch.bool)
    to_the_end = times.new_tensor([kind < equal_share + end_share for kind in kinds], dtype=torch.bool)
    ends = torch.where(still, times, torch.where(to_the_end, torch.ones_like(times), others))
    moving = [i for i, kind in enumerate(kinds) if kind >= equal_share]
    return torch.minimum(times, ends), torch.maximum(times, ends), moving


# How t is drawn


def stratified_t(batch_size: int, generator: torch.Generator | None = None, device=None) -> Tensor:
    """Draw t uniformly on [0, 1), one from each of `batch_size` equal strata, in random order; (B,).

    Every t alone is uniform; together they cover [0, 1) evenly, which lowers the variance of the loss.
    """
    offset = torch.rand(batch_size, generator=generator, device=device)
    stratum = torch.randperm(batch_size, generator=generator, device=device)
    # rounding may give exactly 1.0 in the last stratum: keep the interval half open
    return ((stratum + offset) / batch_size).clamp_max(1 - 2**-24)


def logit_normal(t: Tensor) -> Tensor:
    """Turn uniform t into logit-normal t, whose logit is N(0, 1): the middle of the path comes more often.

    The recipe of Stable Diffusion 3 (arXiv 2403.03206, eq. 19 with m = 0, s = 1). Monotone, so stratified t
    stays stratified.

    Args:
        t: uniform on [0, 1), (B,), fp32 or finer.

    Returns:
        (B,), in (0, 1).
    """
    return torch.special.ndtri(t.clamp(2**-24, 1 - 2**-24)).sigmoid()
