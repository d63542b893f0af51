"""Fidelity and diversity apart: precision, recall, density, coverage, and copies of training images.

Precision and recall: Kynkäänniemi et al., "Improved precision and recall metric for assessing generative
models" (2019). Density and coverage: Naeem et al., "Reliable fidelity and diversity metrics for generative
models" (2020), whose k = 5 is used for all four. Distances are taken block by block in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lediflow.errors import UserError
from lediflow.evaluation.kernels import squared_distances

K = 5
_BLOCK = 1024


@dataclass(frozen=True)
class Manifold:
    """What each image says about the four shares; each share is a mean.

    Attributes:
        precision: whether each generated image lies inside the real set, (N,), 0 or 1.
        density: in how many real neighbourhoods it lies, over k, (N,), 0 or more.
        recall: whether each real image lies inside the generated set, (M,), 0 or 1.
        coverage: whether a generated image lies in its neighbourhood, (M,), 0 or 1.
    """

    precision: Tensor
    density: Tensor
    recall: Tensor
    coverage: Tensor


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
    generated, real = _rows(generated, k), _rows(real, k)
    if generated.shape[1] != real.shape[1]:
        raise UserError("take the features of both sets with the same feature network")
    real_radius, generated_radius = _radii(real, k), _radii(generated, k)
    inside = []
    recall = torch.zeros(len(real), dtype=torch.bool)
    nearest = torch.full((len(real),), torch.inf, dtype=torch.float64)
    for rows, radius in zip(generated.split(_BLOCK), generated_radius.split(_BLOCK), strict=True):
        distances = squared_distances(rows, real)
        inside.append((distances < real_radius).sum(1))
        recall |= (distances < radius[:, None]).any(0)
        nearest = torch.minimum(nearest, distances.amin(0))
    count = torch.cat(inside).double()
    return Manifold((count > 0).double(), count / k, recall.double(), (nearest < real_radius).double())


def nearest_neighbours(queries: Tensor, bank: Tensor, *, itself: bool = False) -> tuple[Tensor, Tensor]:
    """Return the distance (N,) to the nearest row of `bank` for each query, and its index (N,).

    Args:
        queries: (N, D).
        bank: (M, D).
        itself: the queries are the bank: take the nearest other row.
    """
    queries, bank = _rows(queries, 0), _rows(bank, 1 if itself else 0)
    distances, indices = [], []
    for start in range(0, len(queries), _BLOCK):
        block = squared_distances(queries[start : start + _BLOCK], bank)
        if itself:
            rows = torch.arange(len(block))
            block[rows, start + rows] = torch.inf
        distance, index = block.min(1)
        distances.append(distance.sqrt())
        indices.append(index)
    return torch.cat(distances), torch.cat(indices)


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


def _radii(features: Tensor, k: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row."""
    # each row is its own nearest, so the k-th other is the (k + 1)-th
    return torch.cat(
        [squared_distances(rows, features).kthvalue(k + 1, dim=1).values for rows in features.split(_BLOCK)]
    )


def _rows(features: Tensor, k: int) -> Tensor:
    if features.ndim != 2 or len(features) < k + 1:
        raise UserError(
            f"neighbourhoods of {k} images need features (N, D), N at least {k + 1}, "
            f"not {tuple(features.shape)}"
        )
    return features.detach().to("cpu", torch.float64)
