"""The real images that models are measured against: their pixels, their features, and a cache of these.

The cache goes by content: by the pixels as decoded at this size, and by the feature network's weights and
preprocessing. A renamed file is found again, a changed one is not.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lediflow.data.images import ImageData
from lediflow.errors import UserError
from lediflow.evaluation.feature_networks import CLASSIFIER, ClassifierFeatures, FeatureNetwork
from lediflow.evaluation.features import SmallClassifier, train_classifier
from lediflow.evaluation.kernels import CMMD, KID
from lediflow.evaluation.metrics import Moments
from lediflow.evaluation.ranks import from_first, in_batches, is_first
from lediflow.files import written_whole


def default_cache() -> Path:
    """Return the folder of cached features: lediflow in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lediflow"


class RealImages:
    """Up to `most` pictures of a dataset, evenly spread over it, at one size.

    Args:
        dataset: as for `data.images.ImageData`.
        split: of it.
        shape: (C, S, S) of an image.
        most: largest number of pictures.

    Attributes:
        name: the dataset's.
        num_classes: of the dataset, 0 without labels.

    Raises:
        UserError: no such dataset or split, or no images.
    """

    def __init__(self, dataset: str, split: str, shape: tuple[int, int, int], most: int) -> None:
        channels, side, _ = shape
        self._data = ImageData(
            dataset,
            split=split,
            image_size=side,
            channels=1 if channels == 1 else 3,
        )
        self.name, self.num_classes = dataset, self._data.num_classes
        count = min(most, len(self._data))
        spread = torch.linspace(0, len(self._data) - 1, count, dtype=torch.float64)
        self._rows = spread.round().long().tolist()
        self._hash: str | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def pixels(self, indices: range) -> Tensor:
        """Return pictures, uint8 (n, C, S, S)."""
        return torch.stack([self._data[self._rows[i]]["image"] for i in indices])

    def labels(self) -> Tensor:
        """Return the classes, int64 (N,)."""
        return self._data.labels[self._rows]

    def content_hash(self) -> str:
        """Return a digest of all pixels."""
        if self._hash is None:
            digest = hashlib.blake2b(digest_size=16)
            for start in range(0, len(self), 256):
                block = self.pixels(range(start, min(start + 256, len(self))))
                digest.update(f"{tuple(block.shape)}".encode())
                digest.update(block.numpy())
            self._hash = digest.hexdigest()
        return self._hash


@dataclass(frozen=True)
class RealFeatures:
    """What is taken from the real set once for all rows.

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


def real_features(images: RealImages, network: FeatureNetwork, cache: Path, batch_size: int) -> RealFeatures:
    """Return the features of the real set, from the cache where they lie there, else into it."""
    path = cache / f"features-{network.digest}-{images.content_hash()}.safetensors"
    found = from_first(lambda: _load(path))
    if found is None:
        (features,) = in_batches(len(images), batch_size, lambda batch: [network(images.pixels(batch))])
        real = RealFeatures.of(features)
        within = torch.tensor([real.within_mmd, real.within_kernel], dtype=torch.float64)
        _save(path, {"features": features, "within": within})
        return real
    mmd, kernel = found["within"].tolist()
    return RealFeatures(found["features"], Moments.of(found["features"]), mmd, kernel)


def classifier_features(
    images: RealImages, cache: Path, device: torch.device, *, steps: int, seed: int
) -> ClassifierFeatures:
    """Return the features of a small classifier trained on the labels of the real set, or the cached one.

    Raises:
        UserError: the data have no labels.
    """
    if images.num_classes < 2:
        raise UserError(
            f"{CLASSIFIER!r} features need labelled images, and {images.name!r} has no classes; give "
            "--features the folder or Hub id of a vision model"
        )
    pixels, labels = images.pixels(range(len(images))), images.labels()
    labels_digest = hashlib.blake2b(labels.numpy(), digest_size=8).hexdigest()
    path = cache / f"classifier-{images.content_hash()}-{labels_digest}-{steps}-{seed}.safetensors"
    weights = from_first(lambda: _load(path))
    classifier = SmallClassifier(pixels.shape[1], images.num_classes)
    if weights is None:
        classifier = train_classifier(pixels, labels, num_classes=images.num_classes, seed=seed, steps=steps)
        weights = from_first(classifier.state_dict)
        _save(path, weights)
    classifier.load_state_dict(weights)
    return ClassifierFeatures(classifier.eval().requires_grad_(False), device)


def _load(path: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(path) if path.is_file() else None
    except (OSError, SafetensorError):  # damaged: made again
        return None


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    if not is_first():
        return
    try:
        with written_whole(path) as unfinished:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}; give --cache another folder") from None
