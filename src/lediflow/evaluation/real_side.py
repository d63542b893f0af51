"""The real images of an evaluation at one size: reference, held-out images, their features, the floor."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lediflow.errors import UserError
from lediflow.evaluation.bootstrap import Estimate
from lediflow.evaluation.feature_networks import (
    CLASSIFIER,
    CLIP,
    FeatureNetwork,
    open_features,
)
from lediflow.evaluation.measure import distances
from lediflow.evaluation.reference import RealFeatures, RealImages, classifier_features, real_features
from lediflow.evaluation.settings import Settings


@dataclass
class RealSide:
    """The real images at one size.

    Attributes:
        reference: training images.
        held_out: images that were not trained on, or None.
        networks: feature networks.
        features: of the reference, by the network's name.
        unseen: features of the held-out images by the network's name, or None.
        floor: what held-out images score in a model's place, by metric.
    """

    reference: RealImages
    held_out: RealImages | None
    networks: list[FeatureNetwork]
    features: dict[str, RealFeatures]
    unseen: dict[str, Tensor] | None
    floor: dict[str, dict[str, float]]


def open_real_side(
    shape: tuple[int, int, int], settings: Settings, cache: Path, device: torch.device
) -> RealSide:
    """Open the real images at one size and take their features."""
    reference = RealImages(settings.data, "train", shape, settings.reference_images)
    held_out = _held_out(shape, settings)
    chosen = _feature_networks(settings, reference, cache, device)
    features = {n.name: real_features(reference, n, cache, settings.batch_size) for n in chosen}
    if held_out is None:
        return RealSide(reference, None, chosen, features, None, {})
    unseen = {n.name: real_features(held_out, n, cache, settings.batch_size).features for n in chosen}
    floor: dict[str, dict[str, float]] = {}
    for network in chosen:
        count = min(settings.num_images, len(held_out))
        floor |= named(
            network,
            distances(
                network,
                unseen[network.name][:count],
                features[network.name],
                replicates=settings.bootstrap,
                seed=settings.seed,
            ),
        )
    return RealSide(reference, held_out, chosen, features, unseen, floor)


def _held_out(shape: tuple[int, int, int], settings: Settings) -> RealImages | None:
    if settings.validation is not None:
        return RealImages(settings.validation, "train", shape, settings.reference_images)
    try:
        return RealImages(settings.data, "validation", shape, settings.reference_images)
    except UserError:
        return None


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
            f"features of a small classifier trained on {settings.data!r} itself are used, for the default "
            f"is not at hand: {error}. The numbers compare models within this dataset, and with nothing "
            "published",
            stacklevel=2,
        )
        return [classifier()]


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
