"""The network of each stage, with the sizes that a config gives it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from lediflow.networks.auxiliary import AuxiliaryModel
from lediflow.networks.velocity import VelocityTransformer
from lediflow.training.config import Config
from lediflow.training.stage_config import StageName


def build_auxiliary(config: Config) -> AuxiliaryModel:
    """Build theta_E and theta_D for the config's image size; raises UserError for sizes that do not fit."""
    channels, *size = config.sample_shape
    return AuxiliaryModel(sample_size=size, in_channels=channels, **config.auxiliary.model_dump())


def build_flow(
    config: Config, *, conditional: bool = True, average_velocity: bool = False
) -> VelocityTransformer:
    """Build theta_FM, or the baseline's network (the same without z) when not `conditional`."""
    channels, *size = config.sample_shape
    sizes = config.flow.model_dump() | {
        "num_classes": config.data.classes,
        "average_velocity": average_velocity,
    }
    if conditional:
        sizes |= {
            "latent_channels": config.auxiliary.latent_channels,
            "latent_size": config.auxiliary.latent_size,
        }
    else:
        sizes.pop("latent_conditioning")
    return VelocityTransformer(sample_size=size, in_channels=channels, **sizes)


def build_sampler(config: Config, *, average_velocity: bool = False) -> VelocityTransformer:
    """Build theta_L, a flow on z."""
    return VelocityTransformer(
        sample_size=config.auxiliary.latent_size,
        in_channels=config.auxiliary.latent_channels,
        num_classes=config.data.classes,
        average_velocity=average_velocity,
        **config.sampler.model_dump(),
    )


BUILDERS: dict[StageName, Callable[[Config], nn.Module]] = {
    "auxiliary": build_auxiliary,
    "flow": build_flow,
    "sampler": build_sampler,
    "baseline": partial(build_flow, conditional=False),
    "meanflow": partial(build_flow, average_velocity=True),
    "sampler-meanflow": partial(build_sampler, average_velocity=True),
    "baseline-meanflow": partial(build_flow, conditional=False, average_velocity=True),
    "distill": partial(build_flow, average_velocity=True),
}
