"""What a batch gives a stage: source samples x, their targets y, and the conditions of each pair.

images         y alone
gaussian       x ~ N(0, 1),        y an image
learned-prior  x ~ P_L(z),         y an image, z ~ q(z|y) a condition     eq. 3
latent         x = w ~ N(0, 1),    y = z ~ q(z|y), standardised

A new coupling is a class here and a name in `COUPLINGS`; a row of stages.py uses it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lediflow.conditions import Conditions
from lediflow.data.batches import TrainingData
from lediflow.gaussian import DiagonalGaussian
from lediflow.networks.auxiliary import AuxiliaryModel
from lediflow.networks.text import text_bytes
from lediflow.sources import BatchNoise, image_noise, optimal_coupling
from lediflow.training.config import Config
from lediflow.training.texts import EncodedTexts

PREVIEW_IMAGES = 8
Batch = Mapping[str, Tensor]
Carry = Callable[[Tensor, Conditions, int], Tensor]  # (x, conditions, steps) -> where the flow ends


@dataclass
class Context:
    """What the stages of a run share.

    Attributes:
        config: of the run.
        data: what is trained on.
        device: where.
        trained: name of a finished stage -> its network with the averaged weights.
        encoded: the texts of the training images as a frozen encoder reads them, by an image's index; None
            where no network is told them, or by another encoder.
    """

    config: Config
    data: TrainingData
    device: torch.device
    trained: Callable[[str], Any]
    encoded: EncodedTexts | None = None
    _networks: dict[str, Any] = field(default_factory=dict)

    def network(self, stage: str) -> Any:
        """Return the network of a finished stage, frozen, on the device; loaded once."""
        if stage not in self._networks:
            network = self.trained(stage).to(self.device)
            self._networks[stage] = network.eval().requires_grad_(False)
        return self._networks[stage]

    @cached_property
    def posteriors(self) -> Posteriors:
        """q(z|y) of the training images, of the finished auxiliary stage."""
        return Posteriors(self.network("auxiliary"), self.data, self.device)

    @cached_property
    def texts(self) -> Tensor | EncodedTexts:
        """The texts of the training images as networks are told them, by an image's index; (N, ...)."""
        if self.config.text.frozen:
            assert self.encoded is not None, "whoever starts a run encodes its texts"
            return self.encoded
        return text_bytes(self.data.texts, self.config.text.max_length).to(self.device)


class Posteriors:
    """The trained auxiliary model, and q(z|y) of the training images.

    Where the images are held in memory they are encoded once, here (unless `keep` is False); otherwise batch
    by batch.
    """

    def __init__(
        self, auxiliary: AuxiliaryModel, data: TrainingData, device: torch.device, *, keep: bool = True
    ):
        self.auxiliary = auxiliary
        self._cache: tuple[DiagonalGaussian, DiagonalGaussian | None] | None = None
        if data.cached and keep:
            mirrored = encode_all(auxiliary, data, device, mirror=True) if data.flip else None
            self._cache = encode_all(auxiliary, data, device), mirrored

    @torch.no_grad()
    def of(self, batch: Batch) -> DiagonalGaussian:
        """Return q(z|y) of the images of the batch."""
        if self._cache is None:
            return self.auxiliary.encode(batch["image"])
        kept = self._kept(batch)
        changed = batch.get("changed")
        if changed is None or not changed.any():
            return kept
        fresh = self.auxiliary.encode(batch["image"][changed])
        kept.mean[changed], kept.log_var[changed] = fresh.mean, fresh.log_var
        return kept

    def _kept(self, batch: Batch) -> DiagonalGaussian:
        assert self._cache is not None, "the caller looked"
        plain, mirrored = self._cache
        index, flipped = batch["index"], batch["flipped"].view(-1, 1, 1, 1)
        mean, log_var = plain.mean[index], plain.log_var[index]
        if mirrored is not None:
            mean = torch.where(flipped, mirrored.mean[index], mean)
            log_var = torch.where(flipped, mirrored.log_var[index], log_var)
        return DiagonalGaussian(mean, log_var)


@torch.no_grad()
def encode_all(
    auxiliary: AuxiliaryModel,
    data: TrainingData,
    device: torch.device,
    *,
    mirror: bool = False,
    workers: int = 0,
) -> DiagonalGaussian:
    """Return q(z|y) of all images of `data` in order, (N, c, h, w), of their mirror images if `mirror`."""
    means, log_vars = [], []
    batch_size = 32 if device.type == "cpu" else 256  # on a CPU more fall out of the cache: 1.6 times slower
    for y in data.in_order(batch_size, mirror=mirror, workers=workers):
        posterior = auxiliary.encode(y.to(device))
        means.append(posterior.mean)
        log_vars.append(posterior.log_var)
    return DiagonalGaussian(torch.cat(means), torch.cat(log_vars))


@dataclass(frozen=True)
class Pairs:
    """What a velocity is learned from.

    Attributes:
        x: source samples, (B, C, H, W).
        y: their targets, (B, C, H, W).
        conditions: what the network is told of each pair.
        sigma: standard deviation of x at each element, (B, C, H, W), where the source has one that varies.
    """

    x: Tensor
    y: Tensor
    conditions: Conditions
    sigma: Tensor | None = None


class Coupling(ABC):
    """Where x, y and the conditions of a batch come from.

    Attributes:
        name: in the table of stages.
        stream: of the noise behind x; streams are independent.
        tells_labels: whether the classes of the data are a condition, where the run has classes.
        tells_augmentation: whether what was done to an image is one, where images are augmented; z tells it
            already.
    """

    name: str
    stream = "x"
    tells_labels = True
    tells_augmentation = False

    def __init__(self, context: Context, settings: Any, clustered: bool = False, worded: bool = False):
        """Prepare.

        Args:
            context: what the stages of the run share.
            settings: of the stage.
            clustered: whether the network is told the cluster of an image.
            worded: whether it is told its text.
        """
        self.context, self.settings, self.worded = context, settings, worded
        self.clusters: Any = None
        if clustered:
            self.clusters, self.encoder = context.network("clusters"), context.network("auxiliary")

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of x and y."""
        return self.context.config.sample_shape

    @abstractmethod
    def targets(self, batch: Batch, noise: BatchNoise) -> tuple[Tensor, Conditions]:
        """Return y (B, C, H, W) of a batch, and what the network is told of it."""

    def source(self, conditions: Conditions, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return x, and its sigma where that varies, for standard normal `noise` of the shape of x."""
        return noise, None

    def pairs(self, batch: Batch, noise: BatchNoise) -> Pairs:
        """Draw the pairs of a batch."""
        y, conditions = self.targets(batch, noise)
        drawn = noise.normal(self.shape, self.stream)
        if getattr(self.settings, "coupling", "independent") == "optimal-transport":
            drawn = optimal_coupling(drawn, y, conditions.kinds())
        x, sigma = self.source(conditions, drawn)
        return Pairs(x, y, conditions, sigma)

    @abstractmethod
    def preview(self, carry: Carry) -> list[Tensor]:
        """Return rows of images (n, C, H, W), always from the same noise, that show where x is carried."""

    def labels(self, label: Tensor) -> Conditions:
        """Return classes (B,) as a condition, nothing for a run without classes."""
        return Conditions(label=label) if self.context.config.data.classes else Conditions()

    def labels_of(self, batch: Batch) -> Conditions:
        """Return classes, clusters and texts of a batch, where the run and the network have them."""
        labels = self.labels(batch["label"])
        if self.tells_augmentation:
            labels = labels.also(augmentation=batch.get("augmentation"))
        if self.clusters is not None:
            labels = self.clustered(labels, self.context.posteriors.of(batch))
        return labels.also(text=self.context.texts[batch["index"]]) if self.worded else labels

    def clustered(self, labels: Conditions, posterior: DiagonalGaussian) -> Conditions:
        """Return labels with the cluster of each q(z|y)."""
        return labels.also(cluster=self.clusters.assign(self.encoder.standardize(posterior.mean)))

    def preview_labels(self) -> Conditions:
        """The first texts, or classes and clusters in turn, for PREVIEW_IMAGES images made of noise."""
        if self.worded:
            return Conditions(text=self.context.texts[torch.arange(PREVIEW_IMAGES) % len(self.context.texts)])
        turn = torch.arange(PREVIEW_IMAGES, device=self.context.device)
        counts = {"label": self.context.config.data.classes}
        if self.clusters is not None:
            counts["cluster"] = self.clusters.config.count
        return Conditions(**{name: turn % count for name, count in counts.items() if count})

    def preview_noise(self, count: int = PREVIEW_IMAGES) -> Tensor:
        """Return the noise behind x in previews, (count, *shape)."""
        indices = range(count)
        return image_noise(
            self.shape, seed=0, indices=indices, stream=self.stream, device=self.context.device
        )

    def preview_targets(self) -> tuple[Tensor, Conditions]:
        """Return the first images (or normalised codec latents) of the data, and what they are."""
        data, device = self.context.data, self.context.device
        y = data.first(PREVIEW_IMAGES).to(device)
        labels = self.labels(data.first_labels(PREVIEW_IMAGES).to(device))
        if self.clusters is not None:
            labels = self.clustered(labels, self.encoder.encode(y))
        return y, labels.also(text=self.context.texts[: len(y)]) if self.worded else labels


class Images(Coupling):
    """y alone, for what is learned without a source."""

    name = "images"
    tells_labels = False

    def targets(self, batch, noise):
        """The images."""
        return batch["image"], Conditions()

    def preview(self, carry):
        """Nothing: there is no source."""
        return []


class Gaussian(Coupling):
    """x ~ N(0, 1), y an image: plain flow matching."""

    name = "gaussian"
    tells_augmentation = True

    def targets(self, batch, noise):
        """The images."""
        return batch["image"], self.labels_of(batch)

    def preview(self, carry):
        """Rows: 1, 2, 4, 8 steps."""
        x, labels = self.preview_noise(), self.preview_labels()
        return [carry(x, labels, steps) for steps in (1, 2, 4, 8)]


class OfPosterior(Coupling):
    """A coupling that draws z ~ q(z|y) for each image, with the trained auxiliary model."""

    def __init__(self, context: Context, settings: Any, **told: bool):
        super().__init__(context, settings, **told)
        self.auxiliary = context.network("auxiliary")
        self.posteriors = context.posteriors

    def draw_z(self, batch: Batch, noise: BatchNoise) -> Tensor:
        """Return a z for each image of the batch, (B, c, h, w)."""
        return self.posteriors.of(batch).at(noise.normal(self.auxiliary.z_shape, "z"))


class LearnedPrior(OfPosterior):
    """x ~ P_L(z) with z ~ q(z|y), y an image: the flow of LeDiFlow."""

    name = "learned-prior"

    def targets(self, batch, noise):
        """The images, and a z drawn for each."""
        return batch["image"], self.labels_of(batch).also(z=self.draw_z(batch, noise))

    @torch.no_grad()
    def source(self, conditions, noise):
        """x = mu + sigma * noise, eq. 3."""
        prior = self.auxiliary.decode(conditions["z"])
        return prior.at(noise), prior.std

    def preview(self, carry):
        """Rows: images, mu at their z, and 1, 2, 4 steps from P_L at their z."""
        y, labels = self.preview_targets()
        z = self.auxiliary.encode(y).mean
        x, _ = self.source(conditions := labels.also(z=z), self.preview_noise(len(y)))
        return [y, self.auxiliary.decode(z).mean, *(carry(x, conditions, steps) for steps in (1, 2, 4))]


class Latent(OfPosterior):
    """x = w ~ N(0, 1), y = z ~ q(z|y), standardised: the latent sampler."""

    name = "latent"
    stream = "w"
    tells_augmentation = True

    @property
    def shape(self):
        """(c, h, w) of z."""
        return self.auxiliary.z_shape

    def targets(self, batch, noise):
        """A z drawn for each image."""
        return self.auxiliary.standardize(self.draw_z(batch, noise)), self.labels_of(batch)

    def preview(self, carry):
        """Rows: mu at z from 1, 2, 4 steps."""
        w, labels = self.preview_noise(), self.preview_labels()
        ends = [carry(w, labels, steps) for steps in (1, 2, 4)]
        return [self.auxiliary.decode(self.auxiliary.unstandardize(z)).mean for z in ends]


COUPLINGS: dict[str, type[Coupling]] = {c.name: c for c in (Images, Gaussian, LearnedPrior, Latent)}
