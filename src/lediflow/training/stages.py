"""The table of stages: what can be trained, in this order. A new stage is a row here.

A row names a network (builders.py), a coupling, which says what x, y and conditions a batch gives
(couplings.py), and an objective, which says what is learned of them (objectives.py). The sections of the
config, the order of training, what must be there first, and the help texts follow from the rows.

This file imports no torch, for the command line reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lediflow.errors import UserError, nearest
from lediflow.training.settings import (
    AuxiliaryStageConfig,
    ClustersStageConfig,
    CoupledStageConfig,
    DistillStageConfig,
    EndsStageConfig,
    FlowStageConfig,
    MatchingStageConfig,
    MeanFlowStageConfig,
    PriorMeanFlowStageConfig,
    Section,
    SourceMeanFlowStageConfig,
    StageConfig,
    WeakCoupledStageConfig,
    WeakFlowStageConfig,
)


@dataclass(frozen=True)
class StageSpec:
    """One stage.

    Attributes:
        name: on the command line, and of its folder in a run.
        learns: what, in words, for help and docs.
        settings: the type of its section `training.<name>` in the config.
        network: a name in `builders.NETWORKS`.
        coupling: a name in `couplings.COUPLINGS`.
        objective: a name in `objectives.OBJECTIVES`.
        needs: stages whose trained networks it uses; `Config.uses` adds what the config asks for.
        starts_from: the stage whose weights it takes over.
        weak: the stage that trains a worse network of the same data, for autoguidance.
        early_of: of such a stage, the one that trains the better network.
        only_with: key of a setting that must not be 0; otherwise there is nothing to learn.
    """

    name: str
    learns: str
    settings: type[Section]
    network: str
    coupling: str
    objective: str
    needs: tuple[str, ...] = ()
    starts_from: str | None = None
    weak: str | None = None
    early_of: str | None = None
    only_with: str | None = None

    @property
    def section(self) -> str:
        """The key below `training` that holds its settings."""
        return self.name.replace("-", "_")


_ROWS = (
    StageSpec(
        "auxiliary",
        learns="the prior: y -> q(z|y) -> P_L",
        settings=AuxiliaryStageConfig,
        network="auxiliary",
        coupling="images",
        objective="elbo",
    ),
    StageSpec(
        "clusters",
        learns="clusters of z, as labels that nobody had to give",
        settings=ClustersStageConfig,
        network="clusters",
        coupling="latent",
        objective="k-means",
        needs=("auxiliary",),
        only_with="clusters.count",
    ),
    StageSpec(
        "flow",
        learns="x ~ P_L -> y, given z",
        settings=FlowStageConfig,
        network="flow",
        coupling="learned-prior",
        objective="matching",
        needs=("auxiliary",),
    ),
    StageSpec(
        "sampler",
        learns="w ~ N(0, 1) -> z",
        settings=CoupledStageConfig,
        network="sampler",
        coupling="latent",
        objective="matching",
        needs=("auxiliary",),
    ),
    StageSpec(
        "baseline",
        learns="plain flow matching, x ~ N(0, 1) -> y",
        settings=CoupledStageConfig,
        network="baseline",
        coupling="gaussian",
        objective="matching",
    ),
    StageSpec(
        "weak-flow",
        learns="a worse flow, for autoguidance",
        settings=WeakFlowStageConfig,
        network="flow",
        coupling="learned-prior",
        objective="matching",
        needs=("auxiliary",),
        early_of="flow",
    ),
    StageSpec(
        "weak-sampler",
        learns="a worse latent sampler, for autoguidance",
        settings=WeakCoupledStageConfig,
        network="sampler",
        coupling="latent",
        objective="matching",
        needs=("auxiliary",),
        early_of="sampler",
    ),
    StageSpec(
        "weak-baseline",
        learns="a worse baseline, for autoguidance",
        settings=WeakCoupledStageConfig,
        network="baseline",
        coupling="gaussian",
        objective="matching",
        early_of="baseline",
    ),
    StageSpec(
        "meanflow",
        learns="the flow in one evaluation",
        settings=PriorMeanFlowStageConfig,
        network="flow",
        coupling="learned-prior",
        objective="average-velocity",
        needs=("auxiliary",),
        starts_from="flow",
        weak="weak-flow",
    ),
    StageSpec(
        "sampler-meanflow",
        learns="the latent sampler in one evaluation",
        settings=SourceMeanFlowStageConfig,
        network="sampler",
        coupling="latent",
        objective="average-velocity",
        needs=("auxiliary",),
        starts_from="sampler",
        weak="weak-sampler",
    ),
    StageSpec(
        "baseline-meanflow",
        learns="the baseline in one evaluation",
        settings=SourceMeanFlowStageConfig,
        network="baseline",
        coupling="gaussian",
        objective="average-velocity",
        starts_from="baseline",
        weak="weak-baseline",
    ),
    StageSpec(
        "distill",
        learns="the flow's own end points, in one evaluation",
        settings=DistillStageConfig,
        network="flow",
        coupling="learned-prior",
        objective="distillation",
        needs=("auxiliary",),
        starts_from="flow",
        weak="weak-flow",
    ),
    StageSpec(
        "meanflow-distill",
        learns="where several steps of the average velocity end, in one evaluation",
        settings=EndsStageConfig,
        network="flow",
        coupling="learned-prior",
        objective="distillation",
        needs=("auxiliary",),
        starts_from="meanflow",
    ),
    StageSpec(
        "upsampler",
        learns="the coupling flow, low resolution with some noise -> high resolution",
        settings=MatchingStageConfig,
        network="upsampler",
        coupling="upsampled",
        objective="matching",
    ),
    StageSpec(
        "upsampler-meanflow",
        learns="the coupling flow in one evaluation",
        settings=MeanFlowStageConfig,
        network="upsampler",
        coupling="upsampled",
        objective="average-velocity",
        starts_from="upsampler",
    ),
    StageSpec(
        "upsampler-gaussian",
        learns="to compare: noise -> high resolution, told the low resolution",
        settings=MatchingStageConfig,
        network="upsampler",
        coupling="upsampled-gaussian",
        objective="matching",
    ),
    StageSpec(
        "upsampler-regression",
        learns="to compare: low -> high resolution by least squares",
        settings=StageConfig,
        network="upsampler",
        coupling="upsampled-plain",
        objective="regression",
    ),
    StageSpec(
        "upsampler-diffusion",
        learns="to compare: SR3, a diffusion model told the low resolution",
        settings=StageConfig,
        network="upsampler",
        coupling="upsampled-gaussian",
        objective="diffusion",
    ),
    StageSpec(
        "upsampler-prior",
        learns="a Gaussian start for each pixel, from the low resolution",
        settings=StageConfig,
        network="upsampler-prior",
        coupling="upsampled-plain",
        objective="likelihood",
    ),
    StageSpec(
        "upsampler-learned",
        learns="the coupling flow from that start",
        settings=FlowStageConfig,
        network="upsampler",
        coupling="upsampled-learned",
        objective="matching",
        needs=("upsampler-prior",),
    ),
    StageSpec(
        "upsampler-learned-meanflow",
        learns="the same in one evaluation",
        settings=PriorMeanFlowStageConfig,
        network="upsampler",
        coupling="upsampled-learned",
        objective="average-velocity",
        needs=("upsampler-prior",),
        starts_from="upsampler-learned",
    ),
)
STAGES: dict[str, StageSpec] = {row.name: row for row in _ROWS}

# the sections of a config that hold the sizes of each network
SECTIONS: dict[str, tuple[str, ...]] = {
    "auxiliary": ("auxiliary",),
    "clusters": ("auxiliary",),
    "flow": ("auxiliary", "flow"),
    "baseline": ("flow",),
    "sampler": ("auxiliary", "sampler"),
    "upsampler": ("upsampler",),
    "upsampler-prior": ("upsampler",),
}


def check_stage(name: str) -> StageSpec:
    """Return the row of a stage.

    Raises:
        UserError: there is none of that name; with the nearest that there is.
    """
    if name not in STAGES:
        raise UserError(f"unknown stage {name!r}{nearest(name, STAGES)}; choose from {', '.join(STAGES)}")
    return STAGES[name]


def in_order(names: Iterable[str]) -> list[StageSpec]:
    """Return the rows of some stages in the order of training.

    Raises:
        UserError: an unknown name.
    """
    wanted = {check_stage(name).name for name in names}
    return [row for row in STAGES.values() if row.name in wanted]
