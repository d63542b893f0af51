"""What is learned of the pairs that a coupling gives; an objective on a coupling is a stage.

elbo              q(z|y) and P_L                                       eq. 4 and 5
k-means           clusters of z                                        clusters.py
matching          v, the velocity at phi_t                             eq. 2, or eq. 6 with sigma
average-velocity  u over [t, r], for one evaluation                    MeanFlow's identity (flow.py)
distillation      x + u(x, 0, 1) = where a trained flow ends           distillation.py

A new objective is a class and a name in `builders.OBJECTIVES`; a row of stages.py uses it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lediflow import flow, ode
from lediflow.conditions import Conditions
from lediflow.data.batches import MapData, batches
from lediflow.errors import UserError
from lediflow.fields import conditional
from lediflow.gaussian import DiagonalGaussian, elbo_loss
from lediflow.networks.attention import forward_mode
from lediflow.networks.text import MOST_WORDS, without_words
from lediflow.sources import BatchNoise, derive_seed
from lediflow.training.augmentation import Augmentation
from lediflow.training.couplings import Batch, Context, Coupling, encode_all
from lediflow.training.stages import StageSpec
from lediflow.training.teacher import Teacher

Losses = tuple[Tensor, dict[str, Tensor]]


class Objective(ABC):
    """One thing to learn: a network, a loss, a preview.

    Attributes:
        name: of the stage, as `spec.name`.
        network: what is trained.
        settings: how it is optimised.
        coupling: what it is trained on.
        average_velocity: whether the network takes r.
        by_gradients: whether it is learned step by step; otherwise `finish` does all.
        works_sharded: whether the loss can be computed with shards of the weights.
        solver: of the previews.
    """

    average_velocity = False
    by_gradients = True
    works_sharded = True
    solver = "midpoint"

    def __init__(self, spec: StageSpec, context: Context, coupling: type[Coupling], build: Any):
        """Build the network and the coupling.

        Args:
            spec: the row of the stage.
            context: what the stages of the run share.
            coupling: the class that `spec.coupling` names.
            build: (config, average_velocity) -> network, which `spec.network` names.
        """
        self.spec, self.context, self._build = spec, context, build
        self.name, self.config = spec.name, context.config
        self.settings: Any = context.config.stage(spec.name)
        clustered = self.config.clusters.told(spec.network) > 0
        worded = self.config.text.told(spec.network)
        self.coupling = coupling(context, self.settings, clustered=clustered, worded=worded)
        self.network: Any = self.build().to(context.device)
        augment = context.config.data.augment
        self.augment: Augmentation | None = Augmentation(augment) if augment else None

    def build(self) -> Any:
        """Return the network with its initial weights, on the CPU."""
        # they depend on the seed and the stage alone, whatever ran before
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.config.training.seed, self.name, "init"))
            return self._build(self.config, average_velocity=self.average_velocity, **self._strengths())

    def _strengths(self) -> dict[str, Any]:
        """What the network is told of guidance, as an argument of `build`; nothing where it learns none."""
        found = self.config.strengths(self.spec)
        return {"strengths": found} if found else {}

    def learn(self, model: nn.Module, batch: Batch, noise: BatchNoise) -> Losses:
        """Return the loss of a batch as the data serve it; see `loss`."""
        return self.loss(model, self.augment(batch, noise) if self.augment else batch, noise)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, noise: BatchNoise) -> Losses:
        """Return the scalar to minimise, a mean over the images of the batch, and named scalars to log."""

    def preview(self) -> list[Tensor]:
        """Return rows of images (n, C, H, W) that show what the network does now, with fixed noise."""
        return self.coupling.preview(self.carry)

    def carry(self, x: Tensor, conditions: Conditions, steps: int) -> Tensor:
        """Return where the network carries x (B, C, H, W) in a number of steps."""
        field = conditional(self.network, conditions)
        return ode.integrate(field, x, steps=steps, solver=self.solver).end

    def start_from(self, trained: nn.Module) -> None:
        """Take over the weights of a trained network; what average velocity and guidance add stays as it is.

        Raises:
            UserError: the network is another one.
        """
        theirs, ours = trained.state_dict(), self.network.state_dict()
        # what the same network has more of where it takes r and strengths
        added = ours.keys() - self._build(self.config, average_velocity=False).state_dict().keys()
        wrong = sorted((ours.keys() ^ theirs.keys()) - added)
        wrong += [name for name in theirs if name in ours and theirs[name].shape != ours[name].shape]
        if wrong:
            raise UserError(
                f"stage {self.name} cannot start from {self.spec.starts_from}: {wrong[0]} is missing in one, "
                "or of another size"
            )
        self.network.load_state_dict(theirs, strict=False)

    def prepare(self, folder: Path, identity: Mapping[str, Any], accelerator: Accelerator) -> None:
        """Make what is needed once before training, in the stage's `folder`; all processes ask.

        Args:
            folder: of the stage.
            identity: of the trained networks that it relies on.
            accelerator: of the processes.
        """

    def rehearse(self) -> None:
        """Make the least that `loss` needs, in memory: for a rehearsal, instead of `prepare`."""

    def uncompile(self) -> bool:
        """Compute without torch.compile from now on; return whether anything was compiled."""
        return self.network.uncompile()

    def finish(self) -> None:
        """Measure what must be kept with the trained network; called once, with its averaged weights."""

    def report(self) -> dict[str, Any]:
        """Of a stage that is done at once: the line of metrics.jsonl."""
        return {}

    def given(self, conditions: Conditions, noise: BatchNoise) -> Conditions:
        """Drop class, cluster and text of a share of the batch at random: guidance must do without them.

        Of a text's bytes some words are dropped too; and beside a text, it alone, or all but it.
        """
        if not conditions.labels:
            return conditions
        others = [name for name in conditions.labels if name != "text"]
        if "text" in conditions:
            conditions = self._fewer_words(conditions, noise)
            share, u = self.config.text.dropout if others else 0.0, noise.uniform("text")
            conditions = conditions.drop("text", u < share).drop(others, u >= 1 - share)
        return conditions.drop(conditions.labels, noise.uniform("label") < self.config.training.label_dropout)

    def _fewer_words(self, conditions: Conditions, noise: BatchNoise) -> Conditions:
        share = self.config.text.word_dropout
        if not share or self.config.text.frozen:
            return conditions
        draws = torch.special.ndtr(noise.normal((MOST_WORDS,), "words"))
        return conditions.also(text=without_words(conditions["text"], draws < share))

    def served_once(self, stream: str, batch_size: int = 256, most: int | None = None) -> Iterator[Batch]:
        """Yield the images of the data once (of a stream `most`), mirrored and cropped as training sees them.

        The last batch runs on into a second round.

        Args:
            stream: name of the order.
            batch_size: images at a time; fewer where the data has no more.
            most: stop after so many images.
        """
        data, device = self.context.data, self.context.device
        count = len(data) if isinstance(data, MapData) else most
        if count is None:
            raise ValueError("a stream has no end: say how many images")
        count = count if most is None else min(count, most)
        size = min(batch_size, count)
        served = batches(
            data,
            batch_size=size,
            seed=derive_seed(self.config.training.seed, self.name, stream),
            stop=-(-count // size),
            workers=self.config.data.workers,
        )
        for batch in served:
            yield {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}


class Elbo(Objective):
    """Learn encoder and decoder together."""

    def loss(self, model, batch, noise):
        """VGL + beta KL, eq. 5."""
        y, _ = self.coupling.targets(batch, noise)
        posterior, prior = model(y, noise.normal(self.network.z_shape, "z"))
        loss = elbo_loss(prior, y, posterior, self.settings.beta, self.settings.variance_power)
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
        y, _ = self.coupling.preview_targets()
        prior = self.network.decode(self.network.encode(y).mean)
        return [y, prior.mean, prior.at(self.coupling.preview_noise(len(y)))]

    def finish(self):
        """Measure mean and standard deviation of z per channel over the training set."""
        if not self.settings.standardize_z:
            return
        posterior = self._posteriors_as_trained()
        mean = posterior.mean.mean((0, 2, 3), keepdim=True)
        variance = (posterior.mean - mean).square() + posterior.std.square()
        self.network.z_mean.copy_(mean)
        self.network.z_std.copy_(variance.mean((0, 2, 3), keepdim=True).sqrt())

    def _posteriors_as_trained(self) -> DiagonalGaussian:
        """q(z|y) of every image once, mirrored, cropped and drawn as training sees them; (N, c, h, w)."""
        data, device, workers = self.context.data, self.context.device, self.config.data.workers
        if not isinstance(data, MapData):
            return encode_all(self.network, data, device, workers=workers)
        found = [self.network.encode(batch["image"]) for batch in self.served_once("statistics")]
        means, log_vars = (torch.cat([getattr(q, part) for q in found]) for part in ("mean", "log_var"))
        return DiagonalGaussian(means[: len(data)], log_vars[: len(data)])


class Matching(Objective):
    """Learn the velocity."""

    def loss(self, model, batch, noise):
        """Flow matching: eq. 2, or eq. 6 where the source has a sigma and the settings ask for it."""
        pairs, t = self.coupling.pairs(batch, noise), noise.times(self.settings.times)
        v = model(flow.phi(pairs.x, pairs.y, t), t, self.given(pairs.conditions, noise))
        plain = flow.matching_loss(v, pairs.x, pairs.y)
        if pairs.sigma is None or not self.settings.importance_weighting:
            return plain, {}
        weighted = flow.weighted_matching_loss(v, pairs.x, pairs.y, pairs.sigma)
        return weighted, {"unweighted": plain.detach()}


class AverageVelocity(Objective):
    """Learn the average velocity by its identity, beside the velocity itself.

    Attributes:
        correction: (point, v, t, r, conditions) -> (r - t) du/dt, compiled where the model is.
    """

    average_velocity = True
    works_sharded = False  # the derivative in forward mode would cross the shards
    solver = "mean"

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.teacher = Teacher(self.spec, self.context)
        self.correction = self._correction
        if self.config.training.compile == "model":
            # the sizes are fixed; left to itself torch takes those that differ between stages for dynamic
            self.correction = torch.compile(self._correction, dynamic=False)

    def loss(self, model, batch, noise):
        """Regression on v + (r - t) du/dt, eq. 10 of arXiv 2505.13447 with this path's direction.

        Where the stage learns guidance, v is the guided velocity.
        """
        pairs, settings = self.coupling.pairs(batch, noise), self.settings
        conditions = self.given(self.teacher.strengths(pairs.conditions, noise), noise)
        t, r, moving = flow.draw_intervals(
            noise.times(),
            noise.uniform("r"),
            noise.positions,
            equal_share=settings.equal_share,
            end_share=settings.end_share,
        )
        point = flow.phi(pairs.x, pairs.y, t)
        v = self.teacher.velocity(point, t, conditions, flow.velocity(pairs.x, pairs.y))
        # before the derivative: autocast keeps the weights it casts, and those of no_grad have no gradient
        u = model(point, t, conditions, r)
        target = v.clone()
        size = v.new_zeros(())
        if moving:
            told = conditions.rows(moving)
            with forward_mode():
                correction = self.correction(point[moving], v[moving], t[moving], r[moving], told)
            target[moving] += correction
            size = correction.square().mean().sqrt() / v[moving].square().mean().sqrt()
        errors = (u.float() - target).square()
        if pairs.sigma is not None and settings.importance_weighting:
            errors = errors / pairs.sigma.clamp_min(flow.SIGMA_MIN)
        errors = errors.flatten(1).mean(1)
        return flow.adaptive_loss(errors, settings.error_power), {
            "error": errors.detach().mean(),
            "correction": size,
        }

    def uncompile(self):
        """As in `Objective`, for the derivative too."""
        self.correction, compiled = self._correction, self.correction != self._correction
        return super().uncompile() or compiled

    def _correction(self, point: Tensor, v: Tensor, t: Tensor, r: Tensor, conditions: Conditions) -> Tensor:
        return flow.average_velocity_correction(
            lambda point, t: self.network.forward(point, t, conditions, r), point, v, t, r
        )
