"""The Fréchet distance between Gaussians fitted to two sets of features.

Any feature network serves: Inception's features make it the FID, DINOv2's the FD-DINOv2. Fewer samples give a
larger distance, even between two draws of one distribution, so compare only distances taken at equal counts.
Everything is computed in float64 on the CPU.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from lediflow.errors import UserError

_BATCH = 8192


@dataclass(frozen=True)
class Moments:
    """What a Fréchet distance takes of a set of features.

    Attributes:
        count: samples.
        mean: (D,), float64.
        covariance: over count - 1, (D, D), float64.
    """

    count: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Take the moments of features (N, D), any float type, N at least 2.

        Raises:
            UserError: another shape, fewer than 2 samples, or a feature that is not finite.
        """
        if features.ndim != 2:
            raise UserError(f"a Fréchet distance needs features (N, D), not {tuple(features.shape)}")
        count = len(features)
        if count < 2:
            raise UserError(f"a Fréchet distance needs at least 2 samples of each set, not {count}")
        # two passes over batches: nothing cancels, and only a batch at a time is held in float64
        batches = [batch.detach().cpu() for batch in features.split(_BATCH)]
        mean = torch.stack([batch.double().sum(0) for batch in batches]).sum(0) / count
        if not mean.isfinite().all():
            raise UserError(
                "some features are not finite numbers: the model that drew these images has diverged"
            )
        centred = (batch.double() - mean for batch in batches)
        scatter = sum((c.T @ c for c in centred), torch.zeros(len(mean), len(mean), dtype=torch.float64))
        return cls(count, mean, scatter / (count - 1))


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments) -> float:
    """Return the (squared) Fréchet distance between Gaussians fitted to two sets of features.

    ``|μa - μb|² + Tr(Σa + Σb - 2 (Σa Σb)^½)``: Dowson and Landau, "The Fréchet distance between multivariate
    normal distributions" (1982); as the FID by Heusel et al., "GANs Trained by a Two Time-Scale Update Rule"
    (2017), eq. 6.

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
    first, second = (x if isinstance(x, Moments) else Moments.of(x) for x in (a, b))
    fewest, dimensions = min(first.count, second.count), len(first.mean)
    if dimensions != len(second.mean):
        raise UserError(
            f"the two sets of features have {dimensions} and {len(second.mean)} dimensions; "
            "take both with the same feature network"
        )
    if fewest <= dimensions:
        warnings.warn(
            f"{fewest} samples do not determine a covariance in {dimensions} dimensions, "
            f"so this Fréchet distance misleads; use at least {dimensions + 1}, better ten times as many",
            stacklevel=2,
        )
    # the singular values of Σa^½ Σb^½ are the roots of the eigenvalues of Σa Σb: nothing is ever complex
    cross = torch.linalg.svdvals(_root(first.covariance) @ _root(second.covariance)).sum()
    traces = first.covariance.trace() + second.covariance.trace()
    # rounding can put the distance of a set to itself at -1e-14
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


def _root(covariance: Tensor) -> Tensor:
    """Return the symmetric root of a positive semi-definite matrix (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    # a singular covariance has eigenvalues of -1e-17 where it should have 0
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
