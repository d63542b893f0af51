"""The Fréchet distance between two sets of features: how far what a model draws lies from what it was shown.

It takes features, not images, so that any feature network serves: Inception's make it the FID, DINOv2's
the FD-DINOv2. Sums over whole sets are taken in float64 on the CPU, batch by batch where need be.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lediflow.errors import UserError


class Moments:
    """Count, mean and covariance of features that come batch by batch, and of several such together.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
    (1979): no sum of squares is ever subtracted from another, so nothing cancels.

    Attributes:
        count: samples so far.
        mean: (D,), float64.
        scatter: sum of the outer products of the deviations, (D, D), float64.
    """

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self.scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)

    @classmethod
    def of(cls, features: Tensor, batch_size: int = 8192) -> Moments:
        """Return the moments of features (N, D), of which only a batch at a time is held in float64."""
        moments = cls(features.shape[-1])
        for batch in features.split(batch_size):
            moments.update(batch)
        return moments

    def update(self, features: Tensor) -> Moments:
        """Add a batch of features (B, D), any float type; return self.

        Raises:
            UserError: another number of dimensions, or a feature that is not finite.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise UserError(f"these moments take features (B, {len(self.mean)}), not {tuple(features.shape)}")
        features = features.detach().to("cpu", torch.float64)
        if not features.isfinite().all():
            raise UserError(
                "some features are not finite numbers: the model that drew these images has diverged"
            )
        if len(features):
            batch = Moments(len(self.mean))
            batch.count, batch.mean = len(features), features.mean(dim=0)
            centred = features - batch.mean
            batch.scatter = centred.T @ centred
            self.merge(batch)
        return self

    def merge(self, other: Moments) -> Moments:
        """Add what `other`, of another batch or process, has seen; return self."""
        count = self.count + other.count
        if other.count:
            delta = other.mean - self.mean
            between = delta.outer(delta) * (self.count * other.count / count)
            self.scatter = self.scatter + other.scatter + between
            self.mean = self.mean + delta * (other.count / count)
            self.count = count
        return self

    @property
    def covariance(self) -> Tensor:
        """(D, D) over count - 1, float64.

        Raises:
            UserError: fewer than 2 samples.
        """
        if self.count < 2:
            raise UserError(f"a Fréchet distance needs at least 2 samples of each set, not {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments) -> float:
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
        a: features (N, D), N at least 2, any float type; or their moments.
        b: features (M, D), M at least 2; or their moments.

    Returns:
        The distance, at least 0, in the squared unit of the features.

    Raises:
        UserError: if the dimensions differ, a set has fewer than 2 samples, or a feature is not finite.

    Warns:
        UserWarning: if a set has fewer than D + 1 samples. Its covariance is then singular, and the
            distance says more about the count than about the images.
    """
    first, second = _moments(a), _moments(b)
    if first.mean.shape != second.mean.shape:
        raise UserError(
            f"the two sets of features have {len(first.mean)} and {len(second.mean)} dimensions; "
            "take both with the same feature network"
        )
    covariances = first.covariance, second.covariance
    fewest, dimensions = min(first.count, second.count), len(first.mean)
    if fewest < dimensions + 1:
        warnings.warn(
            f"{fewest} samples do not determine a covariance in {dimensions} dimensions, "
            f"so this Fréchet distance misleads; use at least {dimensions + 1}, better ten times as many",
            stacklevel=2,
        )
    cross = torch.linalg.svdvals(_root(covariances[0]) @ _root(covariances[1])).sum()
    traces = covariances[0].trace() + covariances[1].trace()
    # Rounding can put the distance of a set to itself at -1e-14.
    return max(0.0, ((first.mean - second.mean).square().sum() + traces - 2 * cross).item())


def frechet_replicates(samples: Tensor, reference: Moments, counts: Tensor) -> Tensor:
    """Return the Fréchet distance of resampled samples to one reference, for bootstrap intervals.

    Args:
        samples: features (N, D), any float type.
        reference: moments of the real set.
        counts: how often each sample is in each replicate, (R, N), as `bootstrap.resampled` draws them.

    Returns:
        (R,), float64.
    """
    samples, root = samples.detach().to("cpu", torch.float64), _root(reference.covariance)
    distances = torch.empty(len(counts), dtype=torch.float64)
    for i, weight in enumerate(counts):
        mean = weight @ samples / weight.sum()
        centred = (samples - mean) * weight.sqrt()[:, None]
        covariance = centred.T @ centred / (weight.sum() - 1)
        # the eigenvalues' roots are the singular values of frechet_distance, at half the digits and the cost
        cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
        traces = covariance.trace() + reference.covariance.trace()
        distances[i] = (mean - reference.mean).square().sum() + traces - 2 * cross
    return distances


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


def _moments(features: Tensor | Moments) -> Moments:
    if isinstance(features, Moments):
        return features
    if features.ndim != 2:
        raise UserError(f"a Fréchet distance needs features (N, D), not {tuple(features.shape)}")
    return Moments.of(features)


def _root(covariance: Tensor) -> Tensor:
    """Return the symmetric root of a positive semi-definite matrix (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    # A singular covariance has eigenvalues of -1e-17 where it should have 0.
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
