"""Every metric of generated features against real ones, by name, with its interval; add a new one here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lediflow.metrics.bootstrap import Estimate, estimate, estimate_mean, resampled
from lediflow.metrics.features import FeatureNetwork
from lediflow.metrics.frechet import Moments, frechet_distance, frechet_replicates
from lediflow.metrics.kernels import CMMD, KID
from lediflow.metrics.manifold import closer_than_new, manifold, nearest_neighbours

MOST_ON_MANIFOLDS = 10_000  # of each set: the cost grows with the square
CLOSEST = 8

# what a report says of each, by name; those of features that have no published name are called as below
MEANINGS = {
    "cmmd": "CMMD: squared MMD of CLIP embeddings, times 1000. Lower is better.",
    "mmd": "The CMMD's formula in these features. Lower is better; not comparable with published CMMDs.",
    "fid": "FID: Frechet distance of Inception features. Lower is better; depends on the number of images.",
    "frechet": "Frechet distance in these features. Lower is better; depends on the number of images.",
    "kid": "KID: unbiased squared MMD of Inception features, cubic kernel. Lower is better; 0 is best.",
    "kernel": "The KID's formula in these features. Lower is better; 0 is best.",
    "precision": "Share of generated images inside the real set: fidelity. Higher is better.",
    "density": "How densely real images lie around generated ones; about 1 for a perfect model.",
    "recall": "Share of real images inside the generated set: diversity. Higher is better.",
    "coverage": "Share of real images with a generated one nearby: diversity. Higher is better.",
    "copies": "Share of generated images closer to a training image than 99 of 100 new real images are; "
    "about 0.01 for a model that has not learnt images by heart.",
    "psnr": "Reconstruction through encoder, prior and flow: signal-to-noise ratio in dB. Higher is better.",
    "ssim": "Reconstruction: structural similarity. Higher is better.",
    "lpips": "Reconstruction: LPIPS (AlexNet). Lower is better.",
}
DISTANCES = ("cmmd", "mmd", "fid", "frechet", "kid", "kernel")  # those that plots show, lower is better


@dataclass(frozen=True)
class RealFeatures:
    """What is taken from the real set once for all models.

    Attributes:
        features: (M, D), float32.
        moments: of the features.
        within_mmd: mean kernel over pairs, for the CMMD's formula.
        within_kernel: the same for the KID's.
    """

    features: Tensor
    moments: Moments
    within_mmd: float
    within_kernel: float

    @classmethod
    def of(cls, features: Tensor) -> RealFeatures:
        """Take the statistics of features (M, D)."""
        return cls(features, Moments.of(features), CMMD.within(features), KID.within(features))


def distances(
    network: FeatureNetwork, generated: Tensor, real: RealFeatures, *, replicates: int, seed: int
) -> dict[str, Estimate]:
    """Return every metric of generated features against the real ones, by name.

    Intervals resample the generated images; those of recall and coverage, which are shares of the real
    images, resample these.

    Args:
        network: whose features they are, for the metrics' names.
        generated: (N, D).
        real: of the reference.
        replicates: of the bootstrap; 0 for none.
        seed: of the bootstrap.

    Warns:
        UserWarning: a count for which a metric misleads.
    """
    counts = resampled(len(generated), replicates, seed=seed)
    found = {}
    for name, metric, within in (
        (network.mmd_name, CMMD, real.within_mmd),
        (network.kernel_name, KID, real.within_kernel),
    ):
        value = metric(generated, real.features, within_y=within).item()
        spread = (
            metric(generated, real.features, counts=counts, within_y=within) if replicates else counts[:, 0]
        )
        found[name] = estimate(value, spread, least=metric.least)
    value = frechet_distance(generated, real.moments)
    spread = frechet_replicates(generated, real.moments, counts)
    found[network.frechet_name] = estimate(value, spread, least=0.0)
    return found | _shares(generated, real.features, replicates=replicates, seed=seed)


def _shares(generated: Tensor, real: Tensor, *, replicates: int, seed: int) -> dict[str, Estimate]:
    """Precision, density, recall and coverage at equal counts of both sets."""
    count = min(len(generated), len(real), MOST_ON_MANIFOLDS)
    spread = torch.linspace(0, len(real) - 1, count, dtype=torch.float64).round().long()
    found = manifold(generated[:count], real[spread])
    counts = resampled(count, replicates, seed=seed + 1)
    return {
        name: estimate_mean(
            getattr(found, name), counts, least=0.0, most=torch.inf if name == "density" else 1.0
        )
        for name in ("precision", "density", "recall", "coverage")
    }


def copies(
    generated: Tensor, real: RealFeatures, unseen: Tensor | None, *, replicates: int, seed: int
) -> tuple[Estimate, list[dict[str, float]]]:
    """Look for training images among the generated ones.

    Args:
        generated: features (N, D).
        real: of the training images.
        unseen: features of real images not trained on; None compares with the training images' distances
            to each other.
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The share of generated images that lie closer to a training image than 99 of 100 new ones do, and
        the eight closest: {"image", "training_image", "distance"}.
    """
    distance, index = nearest_neighbours(generated, real.features)
    if unseen is None:
        yardstick, _ = nearest_neighbours(real.features, real.features, itself=True)
    else:
        yardstick, _ = nearest_neighbours(unseen, real.features)
    counts = resampled(len(generated), replicates, seed=seed + 2)
    share = estimate_mean(closer_than_new(distance, yardstick), counts, least=0.0, most=1.0)
    closest = distance.argsort()[:CLOSEST].tolist()
    return share, [
        {"image": i, "training_image": int(index[i]), "distance": distance[i].item()} for i in closest
    ]
