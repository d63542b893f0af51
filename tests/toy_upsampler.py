"""Networks whose upsampling has a closed form, and codecs and spaces for them."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from lediflow.codecs import Codec, CodecSpace, latent_digest
from lediflow.gaussian import DiagonalGaussian
from lediflow.networks.model import Network
from lediflow.networks.velocity import VelocityTransformer

TOLD = {"image": {"embedder": "grid"}, "noise_level": {"embedder": "scalar"}}


class Told(Network, ModelMixin, ConfigMixin):
    """A velocity that is what the network is told: image / 2 + noise level / 1000, whatever x and t are."""

    @register_to_config
    def __init__(self, in_channels=3, patch_size=1, average_velocity=False, conditions=None):
        super().__init__()
        self.average_velocity = average_velocity
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, conditions, r=None):
        assert conditions["image"].shape == x.shape
        level = conditions["noise_level"] if "noise_level" in conditions else torch.zeros(len(x))
        return self.factor * conditions["image"] + level.view(-1, 1, 1, 1) / 1000


class Guess(Network, ModelMixin, ConfigMixin):
    """A prior with mu = image + 1 and sigma = exp(image / 4)."""

    @register_to_config
    def __init__(self, scale=1):
        super().__init__()
        self.one = nn.Parameter(torch.tensor(1.0))

    def forward(self, image):
        return DiagonalGaussian(image + self.one, image / 2)


def transformer(channels=3, side=16, **settings):
    """A real network of the same protocol, not zero at the start; patch 2, so sides are even."""
    torch.manual_seed(0)
    network = VelocityTransformer(
        side, channels, 2, (16,), (1,), d_head=8, mapping_width=16, mapping_depth=1,
        conditions={
            "image": {"embedder": "grid", "channels": channels, "size": side},
            "noise_level": {"embedder": "scalar"},
        },
        **settings,
    )  # fmt: skip
    nn.init.normal_(network.patch_out.proj.weight, std=0.1)
    return network.eval()


def space_of(vae, *, standard=False):
    """The codec space of an autoencoder, its latents taken as they are or with some mean and deviation."""
    codec = Codec(vae)
    count = codec.channels
    mean = tuple(0.1 * i for i in range(count)) if not standard else (0.0,) * count
    std = tuple(0.5 + 0.1 * i for i in range(count)) if not standard else (1.0,) * count
    space = CodecSpace("/nowhere/codec", codec.hash, codec.factor, count, mean, std, latent_digest(vae))
    return space.to_dict()
