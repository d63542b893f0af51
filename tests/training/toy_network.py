"""A velocity network that is no transformer: a few convolutions, told the time and the class by a bias."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F

from lediflow.conditions import NOTHING
from lediflow.networks.model import Network


class ToyBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + F.silu(self.conv(x))


class ToyNetwork(Network, ModelMixin, ConfigMixin):
    _repeated_blocks = ["ToyBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(self, sample_size=16, in_channels=1, width=8, conditions=None, average_velocity=False):
        super().__init__()
        self.average_velocity = average_velocity
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.times = nn.Linear(2, width)
        self.label = nn.Embedding(self.classes() + 1, width)
        self.blocks = nn.Sequential(ToyBlock(width), ToyBlock(width))
        self.last = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, x, t, conditions=NOTHING, r=None):
        t = t.reshape(-1).to(x.dtype).expand(len(x))
        span = torch.zeros_like(t) if r is None else r.reshape(-1).to(x.dtype).expand(len(x)) - t
        none = torch.full((len(x),), self.classes(), device=x.device)
        label = conditions.get("label", none)
        if "label" in conditions.dropped:
            label = torch.where(conditions.dropped["label"], none, label)
        told = self.times(torch.stack((t, span), dim=1)) + self.label(label)
        return self.last(self.blocks(self.first(x) + told[:, :, None, None]))


def build_toy(config, *, average_velocity=False):
    """A builder like those of `builders.NETWORKS`."""
    channels, size, _ = config.sample_shape
    classes = config.data.classes
    conditions = {"label": {"embedder": "class", "classes": classes}} if classes else {}
    return ToyNetwork(size, channels, conditions=conditions, average_velocity=average_velocity)
