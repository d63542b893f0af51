"""What each stage learns: a stage is a network, a loss and a preview. The loop is in trainer.py.

auxiliary  y -> q(z|y) -> P_L                 eq. 4 and 5
flow       x ~ P_L -> y, given z and t        eq. 6
sampler    w ~ N(0, 1) -> z, standardised     eq. 2
baseline   x ~ N(0, 1) -> y                   eq. 2, the flow's network without z
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lediflow import flow, ode
from lediflow.data.batches import TrainingData
from lediflow.gaussian import DiagonalGaussian, elbo_loss
from lediflow.networks.auxiliary import AuxiliaryModel
from lediflow.networks.velocity import VelocityTransformer
from lediflow.sources import BatchNoise, derive_seed, image_noise
from lediflow.training.config import Config, StageConfig, StageName

PREVIEW_IMAGES = 8
Batch = dict[str, Tensor]
Losses = tuple[Tensor, dict[str, Tensor]]


def build_auxiliary(config: Config) -> AuxiliaryModel:
    """Build theta_E and theta_D for the config's image size; raises UserError for sizes that do not fit."""
    channels, *size = config.sample_shape
    return AuxiliaryModel(sample_size=size, in_channels=channels, **config.auxiliary.model_dump())


def build_flow(config: Config, *, conditional: bool = True) -> VelocityTransformer:
    """Build theta_FM, or the baseline's network (the same without z) when not `conditional`."""
    channels, *size = config.sample_shape
    sizes = config.flow.model_dump() | {"num_classes": config.data.classes}
    if conditional:
        sizes |= {
            "latent_channels": config.auxiliary.latent_channels,
            "latent_size": config.auxiliary.latent_size,
        }
    else:
        sizes.pop("latent_conditioning")
    return VelocityTransformer(sample_size=size, in_channels=channels, **sizes)


def build_sampler(config: Config) -> VelocityTransformer:
    """Build theta_L, a flow on z."""
    return VelocityTransformer(
        sample_size=config.auxiliary.latent_size,
        in_channels=config.auxiliary.latent_channels,
        num_classes=config.data.classes,
        **config.sampler.model_dump(),
    )


BUILDERS: dict[StageName, Callable[[Config], nn.Module]] = {
    "auxiliary": build_auxiliary,
    "flow": build_flow,
    "sampler": build_sampler,
    "baseline": lambda config: build_flow(config, conditional=False),
}


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
        self.settings: StageConfig = config.stage(self.name)
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


class FlowStage(_OnLatents):
    """Learn to carry x ~ P_L to y."""

    name = "flow"

    def loss(self, model, batch, noise):
        """Importance-weighted flow matching, eq. 6."""
        y, t = batch["image"], noise.times()
        z = self.latents.posterior(batch).at(noise.normal(self.auxiliary.latent_shape, "z"))
        with torch.no_grad():
            prior = self.auxiliary.decode(z)
        x = prior.at(noise.normal(y.shape[1:], "x"))
        v = model(flow.phi(x, y, t), t, z, self.training_labels(batch, noise))
        plain = flow.matching_loss(v, x, y)
        if not self.config.training.flow.importance_weighting:
            return plain, {}
        return flow.weighted_matching_loss(v, x, y, prior.std), {"unweighted": plain.detach()}

    def preview(self):
        """Rows: images, mu at their z, and 1, 2, 4 midpoint steps from P_L at their z."""
        y = self.preview_images()
        z = self.auxiliary.encode(y).mean
        prior = self.auxiliary.decode(z)
        x = prior.at(self.preview_noise(y.shape[1:], "x")[: len(y)])
        labels = self.preview_image_labels()
        ends = [
            ode.integrate(lambda t, state: self.network(state, t, z, labels), x, steps=n).end
            for n in (1, 2, 4)
        ]
        return [y, prior.mean, *ends]


class SamplerStage(_OnLatents):
    """Learn to carry w ~ N(0, 1) to z."""

    name = "sampler"

    def loss(self, model, batch, noise):
        """Flow matching on standardised z, eq. 2."""
        shape, t = self.auxiliary.latent_shape, noise.times()
        z = self.auxiliary.standardize(self.latents.posterior(batch).at(noise.normal(shape, "z")))
        w = noise.normal(shape, "w")
        v = model(flow.phi(w, z, t), t, None, self.training_labels(batch, noise))
        return flow.matching_loss(v, w, z), {}

    def preview(self):
        """Rows: mu at z from 1, 2, 4 midpoint steps."""
        w, labels = self.preview_noise(self.auxiliary.latent_shape, "w"), self.preview_labels()
        ends = [
            ode.integrate(lambda t, state: self.network(state, t, None, labels), w, steps=n).end
            for n in (1, 2, 4)
        ]
        return [self.auxiliary.decode(self.auxiliary.unstandardize(z)).mean for z in ends]


class BaselineStage(Stage):
    """Plain flow matching with the flow's network."""

    name = "baseline"

    def loss(self, model, batch, noise):
        """Flow matching from N(0, 1), eq. 2."""
        y, t = batch["image"], noise.times()
        x = noise.normal(y.shape[1:], "x")
        v = model(flow.phi(x, y, t), t, None, self.training_labels(batch, noise))
        return flow.matching_loss(v, x, y), {}

    def preview(self):
        """Rows: 1, 2, 4, 8 midpoint steps."""
        x, labels = self.preview_noise(self.config.sample_shape, "x"), self.preview_labels()
        return [
            ode.integrate(lambda t, state: self.network(state, t, None, labels), x, steps=n).end
            for n in (1, 2, 4, 8)
        ]


def build_stage(
    name: StageName, config: Config, data: TrainingData, device: torch.device, latents: Latents | None
) -> Stage:
    """Return the stage `name`; `latents` is what `flow` and `sampler` start from."""
    if name == "auxiliary":
        return AuxiliaryStage(config, data, device)
    if name == "baseline":
        return BaselineStage(config, data, device)
    assert latents is not None, "run.train makes them before these stages"
    return {"flow": FlowStage, "sampler": SamplerStage}[name](config, data, device, latents)


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
