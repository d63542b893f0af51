"""Clusters of z: labels that nobody had to give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from lediflow.networks.model import Network


class Clusters(Network, ModelMixin, ConfigMixin):
    """Centres of standardised z, and how many training images belong to each.

    Nothing here is trained by gradients: stage `clusters` finds the centres by k-means.

    Args:
        count: number of clusters, K.
        z_shape: of z, (c, h, w).
        classes: of the data, whose images are counted class by class; 0 for none.

    Attributes:
        centres: (K, c, h, w).
        images: how many of each class and cluster, (classes or 1, K).
    """

    _keep_in_fp32_modules = ["centres", "images"]  # noqa: RUF012
    centres: Tensor
    images: Tensor

    @register_to_config
    def __init__(self, count: int = 16, z_shape: Sequence[int] = (4, 4, 4), classes: int = 0):
        super().__init__()
        self.register_buffer("centres", torch.zeros(count, *z_shape))
        self.register_buffer("images", torch.zeros(max(1, classes), count))

    def assign(self, z: Tensor) -> Tensor:
        """Return the cluster of each standardised z (B, c, h, w): integers (B,) in [0, K)."""
        distances = torch.cdist(z.flatten(1).float(), self.centres.flatten(1).float())
        return distances.argmin(1)

    def draw(self, u: Tensor, label: Tensor | None = None) -> Tensor:
        """Return a cluster for each image, as often as the training images had it.

        Args:
            u: uniform on [0, 1), (B,).
            label: class of each image, (B,), where the data has classes; None counts all images.

        Returns:
            integers (B,) in [0, K); a cluster without images is never drawn.
        """
        images = self.images.to(u.device).double()  # on the CPU, so that all devices draw the same
        counts = images.sum(0, keepdim=True) if label is None else images[label]
        shares = counts.cumsum(1) / counts.sum(1, keepdim=True).clamp_min(1)
        # the last cluster that has images takes what rounding leaves
        return (u.double()[:, None] >= shares[:, :-1]).sum(1).clamp_max(self._last(counts))

    @staticmethod
    def _last(counts: Tensor) -> Tensor:
        places = torch.arange(counts.shape[1], device=counts.device)
        return torch.where(counts > 0, places, 0).amax(1)
