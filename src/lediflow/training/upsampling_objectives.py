"""What is learned of the upsampler's pairs besides a velocity: to compare with, and where the flow may start.

regression   y, by least squares from the enlarged low-resolution sample
diffusion    the noise in y (SR3, arXiv 2104.07636), sampled by DDIM
likelihood   mu and sigma of y (the variance-guided loss, LeDiFlow's eq. 4)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lediflow import flow
from lediflow.conditions import Conditions
from lediflow.training.objectives import Objective

DIFFUSION_STEPS = 1000


class Regression(Objective):
    """Learn y - x at once, as the velocity at t = 0."""

    def loss(self, model, batch, noise):
        """Mean of (x + v - y)^2."""
        pairs = self.coupling.pairs(batch, noise)
        v = model(pairs.x, pairs.x.new_zeros(len(pairs.x)), self.given(pairs.conditions, noise))
        return flow.matching_loss(v, pairs.x, pairs.y), {}

    def carry(self, x, conditions, steps):
        """x + v, whatever the number of steps."""
        return x + self.network(x, x.new_zeros(len(x)), conditions)


class Diffusion(Objective):
    """Learn the noise in y, by the cosine schedule in 1000 steps; the network's t is the step / 999."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.scheduler = ddim_scheduler(pixels=self.config.codec is None)

    def loss(self, model, batch, noise):
        """Mean of (eps_theta - eps)^2, eps being x."""
        pairs = self.coupling.pairs(batch, noise)
        steps = (noise.times() * DIFFUSION_STEPS).long()
        point = self.scheduler.add_noise(pairs.y, pairs.x, steps)
        found = model(point, told_time(steps, point), self.given(pairs.conditions, noise))
        return (found - pairs.x).square().mean(), {}

    def carry(self, x, conditions, steps):
        """DDIM from the noise x."""
        return ddim(self.network, x, conditions, steps, self.scheduler)


def ddim_scheduler(*, pixels: bool) -> Any:
    """Return diffusers' DDIM with the cosine schedule; predicted pixels are kept in [-1, 1]."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=DIFFUSION_STEPS,
        beta_schedule="squaredcos_cap_v2",
        clip_sample=pixels,
        timestep_spacing="trailing",  # few steps still begin at pure noise
    )


@torch.no_grad()
def ddim(network: Any, x: Tensor, conditions: Conditions, steps: int, scheduler: Any) -> Tensor:
    """Return where a network that predicts noise carries x, standard normal (B, C, H, W), by DDIM."""
    scheduler.set_timesteps(steps)
    state = x
    for step in scheduler.timesteps:
        found = network(state, told_time(step, x).expand(len(x)), conditions)
        state = scheduler.step(found, step, state).prev_sample
    return state


def told_time(steps: Tensor, like: Tensor) -> Tensor:
    """Return diffusion steps as the t that the network is told, 1 being pure noise."""
    return (steps / (DIFFUSION_STEPS - 1)).to(like)


class Likelihood(Objective):
    """Learn where the flow starts: a Gaussian for each element of y."""

    def loss(self, model, batch, noise):
        """VGL, eq. 4."""
        y, conditions = self.coupling.targets(batch, noise)
        prior = model(conditions["image"])
        with torch.no_grad():
            metrics = {"error": (y - prior.mean).square().mean(), "sigma": prior.std.mean()}
        return prior.nll(y).mean(), metrics

    def preview(self):
        """Rows: samples, low resolution, mu, a sample."""
        y, image, *_ = self.coupling.preview(lambda x, conditions, steps: x)
        prior = self.network(image)
        return [y, image, prior.mean, prior.at(self.coupling.preview_noise(len(y)))]
