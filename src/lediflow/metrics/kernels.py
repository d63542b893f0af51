"""Distances by kernels: CMMD, and the kernel distance that is the KID over Inception features.

The squared maximum mean discrepancy of Gretton et al., "A kernel two-sample test" (2012). Unlike the Fréchet
distance it assumes no Gaussian. Kernels are summed block by block in float64: no matrix of all pairs is held.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lediflow.errors import UserError

Kernel = Callable[[Tensor, Tensor], Tensor]
_BLOCK = 2048


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared Euclidean distances (N, M) of rows (N, D) and (M, D), never below 0."""
    return (a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T).clamp_(min=0)


def gaussian_kernel(sigma: float) -> Kernel:
    """Return the RBF kernel exp(-|a - b|² / (2 sigma²)), less 1.

    The 1 falls out of every squared MMD, and without it close points lose no digits.
    """
    return lambda a, b: torch.expm1(squared_distances(a, b) / (-2 * sigma**2))


def cubic_kernel(a: Tensor, b: Tensor) -> Tensor:
    """The KID's kernel (a.b / D + 1)³: Bińkowski et al., "Demystifying MMD GANs" (2018)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def mean_kernel(x: Tensor, kernel: Kernel, *, unbiased: bool, counts: Tensor | None = None) -> Tensor:
    """Return the mean of the kernel over the pairs of one set.

    Args:
        x: (N, D), N at least 2.
        kernel: of two blocks of rows.
        unbiased: leave out the pairs of an image with itself (or with its copy in a replicate).
        counts: how often each row is in each of R replicates, (R, N); None for once.

    Returns:
        (R,), float64; (1,) without counts.
    """
    x = _rows(x)
    weights = torch.ones(1, len(x), dtype=torch.float64) if counts is None else counts
    total = torch.zeros(len(weights), dtype=torch.float64)
    own = torch.zeros(len(x), dtype=torch.float64)
    for i in range(0, len(x), _BLOCK):
        rows = slice(i, i + _BLOCK)
        weighted = torch.zeros(len(x[rows]), len(weights), dtype=torch.float64)
        for j in range(0, len(x), _BLOCK):
            block = kernel(x[rows], x[j : j + _BLOCK])
            weighted += block @ weights[:, j : j + _BLOCK].T
            if i == j:
                own[rows] = block.diagonal()
        total += (weights[:, rows] * weighted.T).sum(1)
    pairs = weights.sum(1).square()
    if unbiased:
        total, pairs = total - weights.square() @ own, pairs - weights.square().sum(1)
    return total / pairs


def mmd_squared(
    x: Tensor,
    y: Tensor,
    kernel: Kernel,
    *,
    unbiased: bool,
    counts: Tensor | None = None,
    within_y: float | None = None,
) -> Tensor:
    """Return the squared MMD between two sets.

    Args:
        x: generated, (N, D), N at least 2.
        y: real, (M, D), M at least 2.
        kernel: of two blocks of rows.
        unbiased: the U-statistic, which does not depend on the counts and can fall below 0; else the
            V-statistic, which is never below 0 and grows as the counts shrink.
        counts: resample x, as for :func:`mean_kernel`; y is held fixed.
        within_y: :func:`mean_kernel` of y, if it is known already.

    Returns:
        (R,), float64; (1,) without counts.

    Raises:
        UserError: shapes that do not fit, fewer than 2 samples, or features that are not finite.
    """
    x, y = _rows(x), _rows(y)
    if x.shape[1] != y.shape[1]:
        raise UserError(
            f"the two sets of features have {x.shape[1]} and {y.shape[1]} dimensions; "
            "take both with the same feature network"
        )
    across = torch.cat(
        [sum(kernel(rows, others).sum(1) for others in y.split(_BLOCK)) / len(y) for rows in x.split(_BLOCK)]
    )
    weights = torch.ones(1, len(x), dtype=torch.float64) if counts is None else counts
    if within_y is None:
        within_y = mean_kernel(y, kernel, unbiased=unbiased).item()
    within_x = mean_kernel(x, kernel, unbiased=unbiased, counts=counts)
    return within_x + within_y - 2 * (weights @ across) / weights.sum(1)


class KernelDistance:
    """One published way to take a squared MMD: kernel, estimator, whether to normalise first, scale.

    Attributes:
        least: the smallest possible value.
    """

    def __init__(self, kernel: Kernel, *, unbiased: bool, unit_norm: bool, scale: float) -> None:
        self._kernel, self._unbiased, self._unit_norm = kernel, unbiased, unit_norm
        self._scale, self.least = scale, -torch.inf if unbiased else 0.0

    def within(self, features: Tensor) -> float:
        """Return the mean of the kernel over pairs of the real set, which need be taken only once."""
        return mean_kernel(self._prepare(features), self._kernel, unbiased=self._unbiased).item()

    def __call__(
        self, x: Tensor, y: Tensor, *, counts: Tensor | None = None, within_y: float | None = None
    ) -> Tensor:
        """Return the scaled squared MMD of x (N, D) to y (M, D); arguments as for :func:`mmd_squared`."""
        x, y = self._prepare(x), self._prepare(y)
        return self._scale * mmd_squared(
            x, y, self._kernel, unbiased=self._unbiased, counts=counts, within_y=within_y
        )

    def _prepare(self, features: Tensor) -> Tensor:
        features = _rows(features)
        return F.normalize(features, dim=1) if self._unit_norm else features


# Jayasumana et al., "Rethinking FID: towards a better evaluation metric for image generation" (2024), and
# their code: embeddings of unit length, RBF with sigma 10, V-statistic, times 1000.
CMMD = KernelDistance(gaussian_kernel(10.0), unbiased=False, unit_norm=True, scale=1000.0)
# Over all pairs instead of the mean of random subsets, which estimates the same number with more noise.
KID = KernelDistance(cubic_kernel, unbiased=True, unit_norm=False, scale=1.0)


def _rows(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise UserError(f"a kernel distance needs features (N, D), N at least 2, not {tuple(features.shape)}")
    features = features.detach().to("cpu", torch.float64)
    if not features.isfinite().all():
        raise UserError("some features are not finite numbers: the model that drew these images has diverged")
    return features
