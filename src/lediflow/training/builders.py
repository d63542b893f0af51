"""What the names in the table of stages stand for: networks with the sizes of a config, and whole stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lediflow.networks.auxiliary import AuxiliaryModel
from lediflow.networks.clusters import Clusters
from lediflow.networks.hourglass import pair
from lediflow.networks.unet import VelocityUNet
from lediflow.networks.upsampling_prior import UpsamplingPrior
from lediflow.networks.velocity import VelocityTransformer
from lediflow.training.augmentation import NAME, NUMBERS
from lediflow.training.clusters import KMeans
from lediflow.training.config import Config
from lediflow.training.couplings import COUPLINGS, Context
from lediflow.training.distillation import Distillation
from lediflow.training.objectives import AverageVelocity, Elbo, Matching, Objective
from lediflow.training.stages import STAGES, StageSpec, check_stage
from lediflow.training.upsampled import crop_size
from lediflow.training.upsampling_objectives import Diffusion, Likelihood, Regression
from lediflow.upsampling import MAX_NOISE_LEVEL

Strengths = Mapping[str, tuple[float, float]]  # kinds of guidance that a network is told, and their ranges
NONE: Strengths = {}


def build_auxiliary(config: Config, *, average_velocity: bool = False) -> AuxiliaryModel:
    """Build theta_E and theta_D for the config's image size; raises UserError for sizes that do not fit."""
    channels, *size = config.sample_shape
    return AuxiliaryModel(sample_size=size, in_channels=channels, **config.section("auxiliary").model_dump())


def build_clusters(config: Config, *, average_velocity: bool = False) -> Clusters:
    """Build the clusters of z, all at 0."""
    sizes = config.section("auxiliary")
    shape = (sizes.z_channels, *pair(sizes.z_size))
    return Clusters(config.clusters.number, shape, config.data.classes)


def build_flow(
    config: Config, *, average_velocity: bool = False, strengths: Strengths = NONE
) -> VelocityTransformer:
    """Build theta_FM, which is told z."""
    auxiliary = config.section("auxiliary")
    z = {
        "embedder": {"concat": "grid", "mapping": "flat"}[config.section("flow").z_conditioning],
        "channels": auxiliary.z_channels,
        "size": auxiliary.z_size,
    }
    return _flow_network(config, average_velocity, {**_labels(config, "flow", strengths), "z": z})


def build_baseline(
    config: Config, *, average_velocity: bool = False, strengths: Strengths = NONE
) -> VelocityTransformer:
    """Build the baseline's network: theta_FM without z."""
    return _flow_network(config, average_velocity, _labels(config, "baseline", strengths))


def build_sampler(
    config: Config, *, average_velocity: bool = False, strengths: Strengths = NONE
) -> VelocityTransformer:
    """Build theta_L, a flow on z."""
    auxiliary, sampler = config.section("auxiliary"), config.section("sampler")
    return VelocityTransformer(
        sample_size=auxiliary.z_size,
        in_channels=auxiliary.z_channels,
        conditions=_labels(config, "sampler", strengths),
        average_velocity=average_velocity,
        **sampler.model_dump(),
    )


def _flow_network(config: Config, average_velocity: bool, conditions: dict[str, Any]) -> VelocityTransformer:
    channels, *size = config.sample_shape
    sizes = config.section("flow").model_dump(exclude={"z_conditioning"})
    return VelocityTransformer(
        sample_size=size,
        in_channels=channels,
        conditions=conditions,
        average_velocity=average_velocity,
        **sizes,
    )


def build_upsampler(config: Config, *, average_velocity: bool = False) -> VelocityTransformer | VelocityUNet:
    """Build the coupling flow's network, told the enlarged low-resolution sample and the noise level."""
    upsampler, channels = config.section("upsampler"), config.sample_shape[0]
    size = crop_size(config)
    arguments: dict[str, Any] = {
        "sample_size": size,
        "in_channels": channels,
        "conditions": {
            "image": {"embedder": "grid", "channels": channels, "size": size},
            "noise_level": {"embedder": "scalar", "largest": MAX_NOISE_LEVEL},
        },
        "average_velocity": average_velocity,
    }
    if upsampler.unet is not None:
        return VelocityUNet(**arguments, **upsampler.unet.model_dump())
    return VelocityTransformer(**arguments, any_size=True, **upsampler.transformer.model_dump())


def build_upsampler_prior(config: Config, *, average_velocity: bool = False) -> UpsamplingPrior:
    """Build what predicts the coupling flow's start."""
    upsampler = config.section("upsampler")
    return UpsamplingPrior(
        sample_size=crop_size(config),
        in_channels=config.sample_shape[0],
        scale=upsampler.scale,
        **upsampler.prior.model_dump(),
    )


def _labels(config: Config, network: str, strengths: Strengths) -> dict[str, Any]:
    """The conditions that say what an image is, and how strongly it shall be that."""
    counts = {"label": config.data.classes, "cluster": config.clusters.told(network)}
    told: dict[str, Any] = {
        name: {"embedder": "class", "classes": count} for name, count in counts.items() if count
    }
    if config.text.told(network):
        told["text"] = _text(config)
    ranges = {
        name: {"embedder": "range", "low": low, "high": high} for name, (low, high) in strengths.items()
    }
    if config.data.augment and network != "flow":  # z tells the flow
        told[NAME] = {"embedder": "numbers", "numbers": NUMBERS}
    return {**told, **ranges}


def _text(config: Config) -> dict[str, Any]:
    """How a network is told a text."""
    text = config.text
    sizes = {"length": text.max_length, "features": text.width}
    if text.frozen:
        return {"embedder": "encoded", **sizes, "tokens": text.tokens}
    return {"embedder": "characters", **sizes}


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "auxiliary": build_auxiliary,
    "clusters": build_clusters,
    "flow": build_flow,
    "baseline": build_baseline,
    "sampler": build_sampler,
    "upsampler": build_upsampler,
    "upsampler-prior": build_upsampler_prior,
}

OBJECTIVES: dict[str, type[Objective]] = {
    "elbo": Elbo,
    "k-means": KMeans,
    "matching": Matching,
    "average-velocity": AverageVelocity,
    "distillation": Distillation,
    "regression": Regression,
    "diffusion": Diffusion,
    "likelihood": Likelihood,
}


def build_network(spec: StageSpec, config: Config) -> nn.Module:
    """Build the network that a stage trains."""
    found = config.strengths(spec)
    told = {"strengths": found} if found else {}
    average_velocity = OBJECTIVES[spec.objective].average_velocity
    return NETWORKS[spec.network](config, average_velocity=average_velocity, **told)


def build_stage(name: str, context: Context) -> Objective:
    """Return the stage `name`, with the weights that it starts from.

    Raises:
        UserError: no such stage, sizes that do not fit each other, or no trained network to start from.
    """
    spec = check_stage(name)
    stage = OBJECTIVES[spec.objective](spec, context, COUPLINGS[spec.coupling], NETWORKS[spec.network])
    if spec.starts_from is not None and not getattr(stage.settings, "from_scratch", False):
        stage.start_from(context.network(spec.starts_from))
    return stage


def is_refined(config: Config, network: str) -> bool:
    """Whether the stages of a config teach a network, by its name in `NETWORKS`, an average velocity."""
    specs = [check_stage(name) for name in config.training.stages]
    return any(s.network == network and OBJECTIVES[s.objective].average_velocity for s in specs)


def count_parameters(config: Config, stages: Iterable[str] | None = None) -> dict[str, int]:
    """Build without memory the networks of the stages that the config describes; count their parameters.

    Args:
        config: of the run.
        stages: names of those that are wanted; None for all.

    Returns:
        Parameters by stage name.

    Raises:
        UserError: sizes that do not fit each other, by name.
    """
    with torch.device("meta"):
        return {
            spec.name: sum(p.numel() for p in build_network(spec, config).parameters())
            for spec in map(check_stage, STAGES if stages is None else stages)
            if config.has(spec) and not config.lacks(spec)
        }
