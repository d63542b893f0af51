"""Distances between two sets of features: how far what a model draws lies from what it was shown.

All of them take features, not images, so that any feature network serves. They are sums over whole sets
and are taken in float64 on the CPU.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lediflow.errors import UserError


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the (squared) Fréchet distance between Gaussians fitted to two sets of features.

    ``|μa - μb|² + Tr(Σa + Σb - 2 (Σa Σb)^½)``, with the covariances over n - 1: Dowson and Landau,
    "The Fréchet distance between multivariate normal distributions", J. Multivariate Analysis 12
    (1982); as the FID by Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017), eq. 6.

    The trace of the root is taken as the sum of the singular values of ``Σa^½ Σb^½``, which are the
    roots of the eigenvalues of ``Σa^½ Σb Σa^½`` and so of ``Σa Σb``. The roots of the two symmetric
    matrices come from their eigen-decompositions, so nothing is ever complex.

    **It depends on the number of samples.** Fewer samples give a larger distance, even between two
    draws of one distribution. Compare only distances taken at equal counts, which
    :func:`frechet_at_count` and :func:`frechet_floor` do.

    Args:
        a: features (N, D), N at least 2, any float type.
        b: features (M, D), M at least 2.

    Returns:
        The distance, at least 0, in the squared unit of the features.

    Raises:
        UserError: if the dimensions differ, a set has fewer than 2 samples, or a feature is not finite.

    Warns:
        UserWarning: if a set has fewer than D + 1 samples. Its covariance is then singular, and the
            distance says more about the count than about the images.
    """
    mean_a, covariance_a = _gaussian(a)
    mean_b, covariance_b = _gaussian(b)
    if mean_a.shape != mean_b.shape:
        raise UserError(
            f"the two sets of features have {len(mean_a)} and {len(mean_b)} dimensions; "
            "take both with the same feature network"
        )
    fewest, dimensions = min(len(a), len(b)), len(mean_a)
    if fewest < dimensions + 1:
        warnings.warn(
            f"{fewest} samples do not determine a covariance in {dimensions} dimensions, "
            f"so this Fréchet distance misleads; use at least {dimensions + 1}, better ten times as many",
            stacklevel=2,
        )
    cross = torch.linalg.svdvals(_root(covariance_a) @ _root(covariance_b)).sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    # Rounding can put the distance of a set to itself at -1e-14.
    return max(0.0, distance.item())


def frechet_at_count(samples: Tensor, reference: Tensor, *, count: int, seed: int) -> float:
    """Return the mean Fréchet distance of disjoint groups of ``count`` samples to the whole reference.

    The samples are shuffled by the seed and cut into as many groups of ``count`` as they fill. Every
    group pays the same bias for its size, so that models sampled differently often, and the floor of
    :func:`frechet_floor`, compare; more samples narrow the noise without moving the mean.

    Args:
        samples: features (N, D) of generated images, N at least ``count``.
        reference: features (M, D) of the training images; all of them are used.
        count: group size, at least 2 and best above D.
        seed: decides the groups. With N = ``count`` there is one group and the seed changes nothing.

    Returns:
        The mean distance, at least 0, in the squared unit of the features.

    Raises:
        UserError: if there are fewer than ``count`` samples, and as :func:`frechet_distance`.

    Warns:
        UserWarning: as :func:`frechet_distance`.
    """
    if count < 2 or len(samples) < count:
        raise UserError(
            f"cannot take groups of {count} from {len(samples)} samples: a group holds at least 2, "
            "and there must be enough for one"
        )
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    groups = [group for group in order.split(count) if len(group) == count]
    return sum(frechet_distance(samples[group], reference) for group in groups) / len(groups)


def frechet_floor(train: Tensor, held_out: Tensor, *, count: int | None = None, seed: int) -> float:
    """Return the distance that new real images would score in a model's place: the floor.

    Real images that the models never saw stand for the samples and are measured against the training
    set exactly as samples are, in groups of ``count``. A perfect generator would score about this.
    Measure the models by ``frechet_at_count(generated, train, count=count, ...)`` with the same count,
    for otherwise the biases of the two differ and the floor is none.

    Held-out images are taken, not halves of the training set, because neither the models nor the
    classifier have seen them. The floor is itself an estimate: groups of 297 digits scatter by some
    10 to 20 % about their mean, and a model that close to it is at the floor. A training image drawn
    again lies nearer to the reference than a new one can, so a model clearly *below* the floor may be
    repeating its training images; it has not beaten reality.

    Args:
        train: features (M, D) of the training images, which are the models' reference too.
        held_out: features (N, D) of real images seen neither by the models nor by the classifier.
        count: group size; None takes all N at once.
        seed: decides the groups.

    Returns:
        The floor, at least 0, in the squared unit of the features.

    Raises:
        UserError: as :func:`frechet_at_count`.

    Warns:
        UserWarning: as :func:`frechet_distance`.
    """
    return frechet_at_count(held_out, train, count=len(held_out) if count is None else count, seed=seed)


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and the covariance (D, D) over n - 1 of features (N, D), in float64."""
    if features.ndim != 2 or len(features) < 2:
        raise UserError(
            f"a Fréchet distance needs features (N, D) of at least 2 samples, not {tuple(features.shape)}"
        )
    features = features.detach().to("cpu", torch.float64)
    if not features.isfinite().all():
        raise UserError("some features are not finite numbers: the model that drew these images has diverged")
    mean = features.mean(dim=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def _root(covariance: Tensor) -> Tensor:
    """Return the symmetric root of a positive semi-definite matrix (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    # A singular covariance has eigenvalues of -1e-17 where it should have 0.
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
