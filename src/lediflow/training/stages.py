"""What each stage learns: a stage is a network, a loss and a preview. The loop is in trainer.py.

auxiliary  y -> q(z|y) -> P_L                 eq. 4 and 5
flow       x ~ P_L -> y, given z and t        eq. 6
sampler    w ~ N(0, 1) -> z, standardised     eq. 2
baseline   x ~ N(0, 1) -> y                   eq. 2, the flow's network without z

The stages that refine these to one evaluation are in refine.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lediflow import flow, ode
from lediflow.data.batches import TrainingData
from lediflow.gaussian import DiagonalGaussian, elbo_loss
from lediflow.networks.auxiliary import AuxiliaryModel
from lediflow.sources import BatchNoise, derive_seed, image_noise, optimal_coupling
from lediflow.training.builders import BUILDERS
from lediflow.training.config import Config
from lediflow.training.stage_config import StageName

PREVIEW_IMAGES = 8
Batch = dict[str, Tensor]
Losses = tuple[Tensor, dict[str, Tensor]]


class Stage(ABC):
    """One thing to learn.

    Attributes:
        name: of the stage.
        network: what is trained.
        settings: how it is optimised.
    """

    name: StageName
    network: Any

    def __init__(self, config: Config, data: TrainingData, device: torch.device):
        self.config, self.data, self.device = config, data, device
        self.settings: Any = config.stage(self.name)
        self.network = self.build().to(device)

    def build(self) -> Any:
        """Return the network with its initial weights, on the CPU."""
        # they depend on the seed and the stage alone, whatever ran before
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.config.training.seed, self.name, "init"))
            return BUILDERS[self.name](self.config)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, noise: BatchNoise) -> Losses:
        """Return the scalar to minimise, a mean over the images of the batch, and named scalars to log."""

    @abstractmethod
    def preview(self) -> list[Tensor]:
        """Return rows of images (n, C, H, W) that show what the network does now, with fixed noise."""

    def finish(self) -> None:
        """Measure what must be kept with the trained network; called once, with its averaged weights."""

    def training_labels(self, batch: Batch, noise: BatchNoise) -> Tensor | None:
        """The classes of the batch, (B,), some at random replaced by "no class"; None without classes.

        A network that also learns the velocity without a class can be guided (arXiv 2207.12598).
        """
        classes = self.config.data.classes
        if not classes:
            return None
        dropped = noise.uniform("label") < self.config.training.label_dropout
        return batch["label"].masked_fill(dropped, classes)

    def preview_labels(self) -> Tensor | None:
        """Classes in turn for PREVIEW_IMAGES previews of no image; None without classes."""
        classes = self.config.data.classes
        return torch.arange(PREVIEW_IMAGES, device=self.device) % classes if classes else None

    def preview_noise(self, shape: tuple[int, ...], stream: str) -> Tensor:
        """Fixed noise for previews, (PREVIEW_IMAGES, *shape)."""
        return image_noise(shape, seed=0, indices=range(PREVIEW_IMAGES), stream=stream, device=self.device)

    def preview_images(self) -> Tensor:
        """The first images (or normalised latents) of the data, (n, C, H, W)."""
        return self.data.first(PREVIEW_IMAGES).to(self.device)

    def preview_image_labels(self) -> Tensor | None:
        """The classes of `preview_images`, (n,); None without classes."""
        if not self.config.data.classes:
            return None
        return self.data.first_labels(PREVIEW_IMAGES).to(self.device)


class AuxiliaryStage(Stage):
    """Learn the encoder and the decoder together."""

    name = "auxiliary"

    def loss(self, model, batch, noise):
        """VGL + beta KL, eq. 5."""
        y = batch["image"]
        posterior, prior = model(y, noise.normal(self.network.latent_shape, "z"))
        loss = elbo_loss(prior, y, posterior, self.config.training.auxiliary.beta)
        with torch.no_grad():
            metrics = {
                "vgl": prior.nll(y).mean(),
                "kl_per_image": posterior.kl().flatten(1).sum(1).mean(),
                "sigma": prior.std.mean(),
                "transport_cost": (y - prior.mean).square().mean() + prior.std.square().mean(),
            }
        return loss, metrics

    def preview(self):
        """Rows: images, mu, a sample of P_L."""
        y = self.preview_images()
        prior = self.network.decode(self.network.encode(y).mean)
        return [y, prior.mean, prior.at(self.preview_noise(y.shape[1:], "x")[: len(y)])]

    def finish(self):
        """Measure mean and standard deviation of z per channel over the training set."""
        if not self.settings.standardize_latents:
            return
        posterior = encode_all(self.network, self.data, self.device, workers=self.config.data.workers)
        mean = posterior.mean.mean((0, 2, 3), keepdim=True)
        variance = (posterior.mean - mean).square() + posterior.std.square()
        self.network.latent_mean.copy_(mean)
        self.network.latent_std.copy_(variance.mean((0, 2, 3), keepdim=True).sqrt())


class Latents:
    """The trained auxiliary model, frozen, and q(z|y) of the training images.

    Where the images are held in memory they are encoded once, here; otherwise batch by batch.
    """

    def __init__(self, auxiliary: AuxiliaryModel, data: TrainingData, device: torch.device):
        self.auxiliary = auxiliary.to(device).eval().requires_grad_(False)
        self._cache: tuple[DiagonalGaussian, DiagonalGaussian | None] | None = None
        if data.cached:
            mirrored = encode_all(auxiliary, data, device, mirror=True) if data.flip else None
            self._cache = encode_all(auxiliary, data, device), mirrored

    @torch.no_grad()
    def posterior(self, batch: Batch) -> DiagonalGaussian:
        """Return q(z|y) of the images of the batch."""
        if self._cache is None:
            return self.auxiliary.encode(batch["image"])
        plain, mirrored = self._cache
        index, flipped = batch["index"], batch["flipped"].view(-1, 1, 1, 1)
        mean, log_var = plain.mean[index], plain.log_var[index]
        if mirrored is not None:
            mean = torch.where(flipped, mirrored.mean[index], mean)
            log_var = torch.where(flipped, mirrored.log_var[index], log_var)
        return DiagonalGaussian(mean, log_var)


class _OnLatents(Stage):
    """A stage that needs the trained auxiliary model."""

    def __init__(self, config: Config, data: TrainingData, device: torch.device, latents: Latents):
        super().__init__(config, data, device)
        self.latents, self.auxiliary = latents, latents.auxiliary


@dataclass(frozen=True)
class Pairs:
    """What a velocity is learned from.

    Attributes:
        x: source samples, (B, C, H, W).
        y: their targets, (B, C, H, W).
        z: auxiliary latents of y, (B, c, h, w), where the network has z.
        sigma: standard deviation of x at each element, where the loss is divided by it (eq. 6).
    """

    x: Tensor
    y: Tensor
    z: Tensor | None = None
    sigma: Tensor | None = None


class VelocityStage(Stage):
    """A stage that learns to carry x to y.

    Attributes:
        solver: of the previews.
    """

    solver = "midpoint"

    @abstractmethod
    def pairs(self, batch: Batch, noise: BatchNoise) -> Pairs:
        """Draw the source samples of a batch."""

    def loss(self, model, batch, noise):
        """Flow matching: eq. 2, or eq. 6 where there is a sigma."""
        pairs, t = self.pairs(batch, noise), noise.times(self.settings.times)
        v = model(flow.phi(pairs.x, pairs.y, t), t, pairs.z, self.training_labels(batch, noise))
        plain = flow.matching_loss(v, pairs.x, pairs.y)
        if pairs.sigma is None:
            return plain, {}
        weighted = flow.weighted_matching_loss(v, pairs.x, pairs.y, pairs.sigma)
        return weighted, {"unweighted": plain.detach()}

    def ends(
        self, x: Tensor, z: Tensor | None, labels: Tensor | None, steps: tuple[int, ...] = (1, 2, 4)
    ) -> list[Tensor]:
        """Where the flow carries x in each number of steps."""

        def field(t: Tensor, state: Tensor, r: Tensor | None = None) -> Tensor:
            v: Tensor = self.network(state, t, z, labels, r)
            return v

        return [ode.integrate(field, x, steps=n, solver=self.solver).end for n in steps]

    def coupled(self, x: Tensor, y: Tensor) -> Tensor:
        """The noise x of a batch in the order that `coupling` asks for, (B, ...)."""
        return optimal_coupling(x, y) if self.settings.coupling == "optimal-transport" else x


class FlowStage(_OnLatents, VelocityStage):
    """Learn to carry x ~ P_L to y."""

    name: StageName = "flow"

    def pairs(self, batch, noise):
        """x ~ P_L(z) with z ~ q(z|y)."""
        y = batch["image"]
        z = self.latents.posterior(batch).at(noise.normal(self.auxiliary.latent_shape, "z"))
        with torch.no_grad():
            prior = self.auxiliary.decode(z)
        x = prior.at(noise.normal(y.shape[1:], "x"))
        return Pairs(x, y, z, prior.std if self.settings.importance_weighting else None)

    def preview(self):
        """Rows: images, mu at their z, and 1, 2, 4 steps from P_L at their z."""
        y = self.preview_images()
        z = self.auxiliary.encode(y).mean
        prior = self.auxiliary.decode(z)
        x = prior.at(self.preview_noise(y.shape[1:], "x")[: len(y)])
        return [y, prior.mean, *self.ends(x, z, self.preview_image_labels())]


class SamplerStage(_OnLatents, VelocityStage):
    """Learn to carry w ~ N(0, 1) to z."""

    name: StageName = "sampler"

    def pairs(self, batch, noise):
        """w and a standardised z ~ q(z|y)."""
        shape = self.auxiliary.latent_shape
        z = self.auxiliary.standardize(self.latents.posterior(batch).at(noise.normal(shape, "z")))
        return Pairs(self.coupled(noise.normal(shape, "w"), z), z)

    def preview(self):
        """Rows: mu at z from 1, 2, 4 steps."""
        w = self.preview_noise(self.auxiliary.latent_shape, "w")
        ends = self.ends(w, None, self.preview_labels())
        return [self.auxiliary.decode(self.auxiliary.unstandardize(z)).mean for z in ends]


class BaselineStage(VelocityStage):
    """Plain flow matching with the flow's network."""

    name: StageName = "baseline"

    def pairs(self, batch, noise):
        """x ~ N(0, 1)."""
        y = batch["image"]
        return Pairs(self.coupled(noise.normal(y.shape[1:], "x"), y), y)

    def preview(self):
        """Rows: 1, 2, 4, 8 steps."""
        x = self.preview_noise(self.config.sample_shape, "x")
        return self.ends(x, None, self.preview_labels(), (1, 2, 4, 8))


@torch.no_grad()
def encode_all(
    auxiliary: AuxiliaryModel,
    data: TrainingData,
    device: torch.device,
    *,
    mirror: bool = False,
    workers: int = 0,
    batch_size: int = 256,
) -> DiagonalGaussian:
    """Return q(z|y) of all images of `data` in order, (N, c, h, w), of their mirror images if `mirror`."""
    means, log_vars = [], []
    for y in data.in_order(batch_size, mirror=mirror, workers=workers):
        posterior = auxiliary.encode(y.to(device))
        means.append(posterior.mean)
        log_vars.append(posterior.log_var)
    return DiagonalGaussian(torch.cat(means), torch.cat(log_vars))
