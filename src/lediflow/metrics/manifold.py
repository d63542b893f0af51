"""Fidelity and diversity apart: precision, recall, density, coverage, and copies of training images.

Precision and recall: Kynkäänniemi et al., "Improved precision and recall metric for assessing generative
models" (2019). Density and coverage: Naeem et al., "Reliable fidelity and diversity metrics for generative
models" (2020), whose k = 5 is used for all four. scikit-learn searches by brute force in float64, in blocks
that fit its `working_memory`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from lediflow.errors import UserError

K = 5


@dataclass(frozen=True)
class Manifold:
    """What each image says about the four shares, float64; each share is a mean."""

    precision: Tensor  # (N,): whether a generated image lies inside the real set, 0 or 1
    density: Tensor  # (N,): in how many real neighbourhoods it lies, over k, 0 or more
    recall: Tensor  # (M,): whether a real image lies inside the generated set, 0 or 1
    coverage: Tensor  # (M,): whether a generated image lies in its neighbourhood, 0 or 1


def manifold(generated: Tensor, real: Tensor, *, k: int = K) -> Manifold:
    """Compare where two sets of features lie.

    The four depend on the counts: give both sets the same.

    Args:
        generated: features (N, D).
        real: features (M, D).
        k: neighbours that make a neighbourhood, at least 1.

    Raises:
        UserError: fewer than k + 1 images in a set, or shapes that do not fit.
    """
    ours, theirs = _rows(generated, k), _rows(real, k)
    if ours.shape[1] != theirs.shape[1]:
        raise UserError("take the features of both sets with the same feature network")
    # radius of a neighbourhood: distance to the k-th nearest other image of the same set
    radius, real_radius = (
        NearestNeighbors(n_neighbors=k, algorithm="brute").fit(rows).kneighbors()[0][:, -1]
        for rows in (ours, theirs)
    )
    inside = np.zeros(len(ours))
    recall, coverage = np.zeros(len(theirs), dtype=bool), np.zeros(len(theirs), dtype=bool)
    start = 0
    for distance in pairwise_distances_chunked(ours, theirs):
        rows = slice(start, start := start + len(distance))
        near = distance < real_radius
        inside[rows] = near.sum(1)
        coverage |= near.any(0)
        recall |= (distance < radius[rows, None]).any(0)
    return Manifold(
        *(torch.from_numpy(x.astype(np.float64)) for x in (inside > 0, inside / k, recall, coverage))
    )


def nearest_neighbours(queries: Tensor, bank: Tensor, *, itself: bool = False) -> tuple[Tensor, Tensor]:
    """Return the distance (N,) to the nearest row of `bank` for each query, and its index (N,).

    Args:
        queries: (N, D).
        bank: (M, D).
        itself: the queries are the bank: take the nearest other row.
    """
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(_rows(bank, 1 if itself else 0))
    distance, index = search.kneighbors(None if itself else _rows(queries, 0))
    return torch.from_numpy(distance[:, 0]), torch.from_numpy(index[:, 0])


def closer_than_new(generated: Tensor, unseen: Tensor) -> Tensor:
    """Tell which generated images lie closer to a training image than new real images almost ever do.

    Args:
        generated: distances of generated images to their nearest training image, (N,).
        unseen: the same of real images that were not trained on, (M,); or, where there are none, of the
            training images to each other.

    Returns:
        (N,), 1.0 where the distance is below the smallest hundredth of `unseen`. Their share is about 0.01
        for a model that has learnt the data and not its images by heart.
    """
    return (generated < torch.quantile(unseen, 0.01)).double()


def _rows(features: Tensor, k: int) -> np.ndarray:
    if features.ndim != 2 or len(features) < k + 1:
        raise UserError(
            f"neighbourhoods of {k} images need features (N, D), N at least {k + 1}, "
            f"not {tuple(features.shape)}"
        )
    rows = features.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(rows).all():
        raise UserError("some features are not finite numbers: the model that drew these images has diverged")
    return rows
