"""The diagonal Gaussian: both q(z|y) = N(mu_E, sigma_E^2) and the learned prior P_L = N(mu, sigma^2).

Numbers of equations are those of LeDiFlow (arXiv 2505.20723).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, exp(log_var)), independent in every element.

    Args:
        mean: any shape.
        log_var: natural logarithm of the variance, same shape as `mean`.

    Raises:
        ValueError: the two shapes differ.
    """

    mean: Tensor
    log_var: Tensor

    def __post_init__(self) -> None:
        if self.mean.shape != self.log_var.shape:
            raise ValueError(f"mean {tuple(self.mean.shape)} and log_var {tuple(self.log_var.shape)} differ")

    @property
    def std(self) -> Tensor:
        """sigma, the standard deviation; same shape as `mean`."""
        return (0.5 * self.log_var).exp()

    def at(self, noise: Tensor) -> Tensor:
        """Return mean + sigma * noise, the reparametrised sample for a given standard normal `noise`."""
        return self.mean + self.std * noise

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw one sample of the shape of `mean`; differentiable in mean and log_var."""
        noise = torch.randn(
            self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype
        )
        return self.at(noise)

    def nll(self, y: Tensor) -> Tensor:
        """Variance-guided loss, eq. 4: -log N(y | mean, sigma^2) of each element, in nats.

        Returns:
            Same shape as `y`. Average it, do not sum it, to compare images of different sizes.
        """
        return 0.5 * ((y - self.mean).square() * (-self.log_var).exp() + self.log_var + math.log(2 * math.pi))

    def kl(self) -> Tensor:
        """KL(N(mean, sigma^2) || N(0, 1)) of each element, in nats: the regulariser of eq. 5."""
        return 0.5 * (self.mean.square() + self.log_var.exp() - 1 - self.log_var)


def elbo_loss(
    prior: DiagonalGaussian,
    y: Tensor,
    posterior: DiagonalGaussian,
    beta: float = 1.0,
    variance_power: float = 0.0,
) -> Tensor:
    """Loss of the auxiliary model, eq. 5, in nats per image element.

    L = mean(VGL) + beta * (sum of KL over z) / (number of image elements). In these units beta = 1 is the
    evidence lower bound at every image and latent size. The paper's 1e-3, with both terms averaged per
    element, is 1e-3 * (image elements / latent elements) here: 0.77 for 256x256x3 images and 8x8x4 latents.

    Args:
        prior: P_L, shape (B, C, H, W).
        y: images or latents, shape (B, C, H, W).
        posterior: q(z|y), shape (B, ...).
        beta: weight of the KL term; lower reconstructs better, higher gives a more regular latent space.
        variance_power: p in the weight sigma^(2 p) of each element's VGL, held constant, of mean 1 (beta-NLL,
            arXiv 2203.09168). At 0, eq. 5, elements that are sure (the white ground of a drawing) outweigh
            the others by 1 / sigma^2; at 1 all errors of mu weigh the same.

    Returns:
        A scalar.
    """
    kl_per_image = posterior.kl().flatten(1).sum(1).mean()
    vgl = prior.nll(y)
    if variance_power:
        weight = (variance_power * prior.log_var.detach()).exp()
        vgl = vgl * (weight / weight.mean())
    return vgl.mean() + beta * kl_per_image / y[0].numel()
