"""Stage `clusters`: k-means of z, which gives unlabelled images labels to guide by."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lediflow.data.batches import MapData, TrainingData
from lediflow.errors import UserError
from lediflow.sources import derive_seed
from lediflow.training.config import Config
from lediflow.training.objectives import Objective

MOST = 256  # clusters that "auto" gives


def settle_clusters(config: Config, data: TrainingData) -> Config:
    """Return the config with a number for `clusters.count: auto`.

    The more images, the more clusters, each with more images as well: the power of two nearest to 0.4 times
    the root of their number.

    Raises:
        UserError: more clusters than images.
    """
    count = len(data) if isinstance(data, MapData) else None
    clusters = config.clusters
    if clusters.count == "auto":
        wanted = 0.4 * math.sqrt(count or config.training.clusters.images)  # type: ignore[attr-defined]
        number = min(MOST, 2 ** max(1, round(math.log2(max(1.0, wanted)))))
        config = config.model_copy(update={"clusters": clusters.model_copy(update={"count": number})})
    if count is not None and config.clusters.number > count:
        raise UserError(f"clusters.count {config.clusters.count} is more than the {count} images")
    return config


class KMeans(Objective):
    """Find centres of standardised z, and count the images of each; all in `finish`."""

    by_gradients = False
    network: Any

    def loss(self, model, batch, noise):
        """None: k-means is not learned by gradients."""
        raise NotImplementedError(f"{self.name} is not learned by gradients")

    def _z(self, batch: Any) -> Tensor:
        z: Tensor = self.coupling.context.posteriors.of(batch).mean
        return self.coupling.context.network("auxiliary").standardize(z)

    @torch.no_grad()
    def finish(self):
        """k-means of at most `images` images, and their histogram, of each class for itself."""
        from sklearn.cluster import MiniBatchKMeans

        served = [
            (self._z(batch).flatten(1).float().cpu(), batch["label"].cpu())
            for batch in self.served_once("k-means", most=self.settings.images)
        ]
        z, labels = torch.cat([z for z, _ in served]), torch.cat([label for _, label in served])
        if isinstance(self.context.data, MapData):
            z, labels = z[: len(self.context.data)], labels[: len(self.context.data)]
        count = self.network.config.count
        if len(z) < count:
            raise UserError(f"clusters.count {count} is more than the {len(z)} images")
        seed = self.config.training.seed
        if not 0 <= seed < 2**32:  # scikit-learn takes no other
            seed = derive_seed(seed, "clusters") % 2**32
        found = MiniBatchKMeans(count, random_state=seed, n_init=10, batch_size=1024).fit(z.numpy())
        centres = torch.from_numpy(found.cluster_centers_).view_as(self.network.centres)
        self.network.centres.copy_(centres)
        cluster = self.network.assign(z.view(-1, *centres.shape[1:]).to(self.network.device)).cpu()
        row = labels if self.config.data.classes else torch.zeros_like(labels)
        images = torch.zeros(self.network.images.shape)
        images.index_put_((row, cluster), torch.ones(len(z)), accumulate=True)
        self.network.images.copy_(images)

        self.inertia = found.inertia_ / z.numel()

    def report(self):
        """The mean squared distance of z to its centre, per element, and how even the clusters are."""
        images = self.network.images.sum(0)
        return {
            "loss": self.inertia,
            "smallest": int(images.min()),
            "largest": int(images.max()),
            "images_per_second": None,
            "skipped": 0,
        }

    def preview(self):
        """mu at the centres of the largest clusters."""
        auxiliary = self.context.network("auxiliary")
        largest = self.network.images.sum(0).argsort(descending=True)[:16]
        centres = self.network.centres[largest].to(self.context.device)
        return [auxiliary.decode(auxiliary.unstandardize(centres)).mean]
