"""The real images that models are measured against: pixels, features, the floor, and a cache of the features.

The cache goes by content: by the pixels as decoded at this size, and by the feature network's weights and
preprocessing. A renamed file is found again, a changed one is not.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lediflow.data.images import ImageData
from lediflow.errors import UserError
from lediflow.evaluation.request import Settings
from lediflow.files import clear_files, written_whole
from lediflow.metrics.bootstrap import Estimate
from lediflow.metrics.classifier import SmallClassifier, train_classifier
from lediflow.metrics.features import CLASSIFIER, CLIP, ClassifierFeatures, FeatureNetwork, open_features
from lediflow.metrics.frechet import Moments
from lediflow.metrics.scores import RealFeatures, distances
from lediflow.progress import Progress

_BLOCK = 256
DAY = 24 * 3600.0


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
        self._data = ImageData(dataset, split=split, image_size=side, channels=1 if channels == 1 else 3)
        self.name, self.num_classes = dataset, self._data.num_classes
        count = min(most, len(self._data))
        spread = torch.linspace(0, len(self._data) - 1, count, dtype=torch.float64)
        self._rows = spread.round().long().tolist()
        self._hash: str | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def pixels(self, indices: Iterable[int] | Tensor) -> Tensor:
        """Return pictures, uint8 (n, C, S, S)."""
        wanted = indices.tolist() if isinstance(indices, Tensor) else indices
        return torch.stack([self._data[self._rows[i]]["image"] for i in wanted])

    def labels(self) -> Tensor:
        """Return the classes, int64 (N,)."""
        return self._data.labels[self._rows]

    def content_hash(self) -> str:
        """Return a digest of all pixels."""
        if self._hash is None:
            digest = hashlib.blake2b(digest_size=16)
            for start in range(0, len(self), _BLOCK):
                block = self.pixels(range(start, min(start + _BLOCK, len(self))))
                digest.update(f"{tuple(block.shape)}".encode())
                digest.update(block.numpy())
            self._hash = digest.hexdigest()
        return self._hash


@dataclass
class RealSide:
    """The real images at one size."""

    reference: RealImages  # training images
    held_out: RealImages | None  # images that were not trained on
    networks: list[FeatureNetwork]
    features: dict[str, RealFeatures]  # of the reference, by the network's name
    unseen: dict[str, Tensor] | None  # features of the held-out images, likewise
    floor: dict[str, dict[str, float]]  # what held-out images score in a model's place, by metric


def open_real_side(
    shape: tuple[int, int, int], settings: Settings, cache: Path, device: torch.device
) -> RealSide:
    """Open the real images at one size and take their features; the floor is measured as a model's row is.

    Raises:
        UserError: no such dataset, no feature network, or a cache that cannot be written.

    Warns:
        UserWarning: default features that are unavailable, or a count for which a metric misleads.
    """
    reference, held_out = RealImages(settings.data, "train", shape, settings.reference_images), None
    if settings.validation is not None:
        held_out = RealImages(settings.validation, "train", shape, settings.reference_images)
    else:
        with suppress(UserError):  # there is no such split, which count_notes says
            held_out = RealImages(settings.data, "validation", shape, settings.reference_images)
    networks = _feature_networks(settings, reference, cache, device)
    features = {n.name: real_features(reference, n, cache, settings.batch_size) for n in networks}
    if held_out is None:
        return RealSide(reference, None, networks, features, None, {})
    unseen = {n.name: real_features(held_out, n, cache, settings.batch_size).features for n in networks}
    floor: dict[str, dict[str, float]] = {}
    many = {"replicates": settings.bootstrap, "seed": settings.seed}
    for network in networks:
        found = unseen[network.name][: settings.num_images]
        floor |= named(network, distances(network, found, features[network.name], **many))
    return RealSide(reference, held_out, networks, features, unseen, floor)


def count_notes(side: RealSide, settings: Settings) -> list[str]:
    """Say where the counts of the sets make a number mislead."""
    notes = []
    if len(side.reference) < settings.num_images:
        notes.append(
            f"only {len(side.reference)} real images stand against {settings.num_images} generated ones: "
            "precision, density, recall and coverage use that many of both"
        )
    if side.held_out is None:
        notes.append(
            "there are no held-out images, so there is no floor, and copies are judged by the distances "
            "between training images; give --validation"
        )
    elif len(side.held_out) < settings.num_images:
        notes.append(
            f"the floor is measured with {len(side.held_out)} held-out images and the rows with "
            f"{settings.num_images}: Frechet distances and MMDs shrink as the count grows, so this floor "
            f"lies too high for them; --num-images {len(side.held_out)} puts both on one footing"
        )
    return notes


def named(network: FeatureNetwork, found: dict[str, Estimate]) -> dict[str, dict[str, float]]:
    """Return metrics as results.json holds them, by "features/metric".

    Raises:
        UserError: one is not finite.
    """
    values = {f"{network.name}/{name}": asdict(value) for name, value in found.items()}
    for name, value in values.items():
        if not math.isfinite(value["value"]):
            raise UserError(f"{name} is not a finite number: the model that drew these images has diverged")
    return values


def features_of(
    count: int,
    batch_size: int,
    pixels: Callable[[range], Tensor],
    networks: Sequence[FeatureNetwork],
    *,
    label: str,
) -> list[Tensor]:
    """Return the features (N, D) of `count` images by each network, batch by batch.

    Whole batches go to the processes of a launch in turn, so each is made of the same images, and comes out
    the same to the last bit, whatever the number of processes.

    Args:
        count: images.
        batch_size: images of a batch; the last may be smaller.
        pixels: gives the images of a range of indices, uint8 or float in [-1, 1].
        networks: at least one.
        label: what the line of progress calls it.
    """
    state = PartialState()
    mine = range(0, count, batch_size)[state.process_index :: state.num_processes]
    parts = []
    with Progress(label, 0, count, silent=not state.is_main_process) as progress:
        for start in mine:
            end = min(start + batch_size, count)
            images = pixels(range(start, end))
            parts.append((start, [network(images) for network in networks]))
            progress.update(end, "images")
    columns = zip(
        *(features for _, features in sorted(gather_object(parts), key=lambda part: part[0])), strict=True
    )
    return [torch.cat(batches) for batches in columns]


def real_features(images: RealImages, network: FeatureNetwork, cache: Path, batch_size: int) -> RealFeatures:
    """Return the features of the real set, from the cache where they lie there, else into it."""
    path = cache / f"features-{network.digest}-{images.content_hash()}.safetensors"
    # whether they lie there is for one process to say: the others may see another disk
    (found,) = broadcast_object_list([_load(path)])
    if found is not None:
        mmd, kernel = found["within"].tolist()
        return RealFeatures(found["features"], Moments.of(found["features"]), mmd, kernel)
    (features,) = features_of(len(images), batch_size, images.pixels, [network], label="real images")
    real = RealFeatures.of(features)
    within = torch.tensor([real.within_mmd, real.within_kernel], dtype=torch.float64)
    _save(path, {"features": features, "within": within})
    return real


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
    labels = images.labels()
    labels_digest = hashlib.blake2b(labels.numpy(), digest_size=8).hexdigest()
    path = cache / f"classifier-{images.content_hash()}-{labels_digest}-{steps}-{seed}.safetensors"
    weights, state = _load(path), PartialState()
    if weights is None and state.is_main_process:
        with Progress("classifier", 0, steps) as progress:
            classifier = train_classifier(
                images.pixels,
                labels,
                num_classes=images.num_classes,
                seed=seed,
                steps=steps,
                progress=lambda step, loss: progress.update(step, f"loss {loss:.3f}"),
            )
        weights = classifier.state_dict()
        _save(path, weights)
    (weights,) = broadcast_object_list([weights])
    network = SmallClassifier(len(images.pixels([0])[0]), images.num_classes)
    network.load_state_dict(weights)
    return ClassifierFeatures(network.eval().requires_grad_(False), device)


def _feature_networks(
    settings: Settings, reference: RealImages, cache: Path, device: torch.device
) -> list[FeatureNetwork]:
    def classifier() -> FeatureNetwork:
        return classifier_features(
            reference, cache, device, steps=settings.classifier_steps, seed=settings.seed
        )

    if settings.features:
        found = [
            classifier() if name == CLASSIFIER else open_features(name, device) for name in settings.features
        ]
        if len({network.name for network in found}) < len(found):
            raise UserError("two of the --features have the same name; give one of them at a time")
        return found
    try:
        return [open_features(CLIP, device)]
    except UserError as error:
        if reference.num_classes < 2:
            raise
        warnings.warn(
            f"features of a small classifier trained on {settings.data!r} itself are used, because the "
            f"default is not available: {error}. The numbers compare models within this dataset, and with "
            "nothing published",
            stacklevel=2,
        )
        return [classifier()]


def _load(path: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(path) if path.is_file() else None
    except (OSError, SafetensorError):  # damaged: made again
        return None


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    if not PartialState().is_main_process:
        return
    try:
        clear_files(path.parent, older_than=DAY)  # others may be writing to the cache now
        with written_whole(path) as unfinished:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}; give --cache another folder") from None
