"""The stages by name, what each needs, and the settings of each."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
StageName = Literal[
    "auxiliary",
    "flow",
    "sampler",
    "baseline",
    "meanflow",
    "sampler-meanflow",
    "baseline-meanflow",
    "distill",
]
STAGES: tuple[StageName, ...] = get_args(StageName)
NEEDS_LATENTS: tuple[StageName, ...] = ("flow", "sampler", "meanflow", "sampler-meanflow", "distill")
TEACHERS: dict[StageName, StageName] = {
    "meanflow": "flow",
    "sampler-meanflow": "sampler",
    "baseline-meanflow": "baseline",
    "distill": "flow",
}


def section(stage: StageName) -> str:
    """Return the key below `training` that holds the settings of a stage."""
    return stage.replace("-", "_")


class Section(BaseModel):
    """Settings that refuse what they do not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StageConfig(Section):
    """How one stage is optimised (AdamW)."""

    steps: Positive = 1000
    batch_size: Positive = 64
    learning_rate: float = Field(3e-4, gt=0)
    warmup_steps: Count = Field(100, description="linear warm-up")
    schedule: Literal["constant", "cosine", "linear", "inverse-sqrt"] = Field(
        "constant", description="after warm-up; cosine and linear end at 0"
    )
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(1e-2, ge=0, description="on matrices only")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")


class AuxiliaryStageConfig(StageConfig):
    """Stage `auxiliary`."""

    beta: float = Field(
        1.0, ge=0, description="weight of the KL term, 1 is the ELBO (see gaussian.elbo_loss)"
    )
    standardize_latents: bool = Field(
        True, description="the sampler learns z with mean 0 and variance 1 per channel; false: z as it is"
    )


class MatchingStageConfig(StageConfig):
    """A stage that learns a velocity."""

    times: Literal["uniform", "logit-normal"] = Field(
        "uniform", description="how t is drawn; logit-normal looks more often at the middle of the path"
    )


class FlowStageConfig(MatchingStageConfig):
    """Stage `flow`."""

    importance_weighting: bool = Field(True, description="eq. 6 instead of eq. 2")


class CoupledStageConfig(MatchingStageConfig):
    """Stages `sampler` and `baseline`, whose source is N(0, 1)."""

    coupling: Literal["independent", "optimal-transport"] = Field(
        "independent",
        description="optimal-transport deals out a batch's noise so that its paths are shortest (OT-CFM); "
        "with several processes or accumulate, within each part of the batch",
    )


class RefiningStageConfig(StageConfig):
    """A stage that starts from a trained one."""

    learning_rate: float = Field(3e-4, gt=0)


class MeanFlowStageConfig(RefiningStageConfig):
    """Stages `meanflow`, `sampler-meanflow` and `baseline-meanflow`: average velocity, for one evaluation."""

    from_scratch: bool = Field(False, description="fresh weights instead of those of the trained stage")
    equal_share: float = Field(0.5, ge=0, le=1, description="of the batch with r = t, the velocity itself")
    end_share: float = Field(
        0.25, ge=0, le=1, description="of the batch with r = 1; the rest sorts two times"
    )
    error_power: float = Field(
        0.75, ge=0, le=1, description="0 is the squared error; towards 1 large errors count less"
    )


class PriorMeanFlowStageConfig(MeanFlowStageConfig):
    """Stage `meanflow`."""

    importance_weighting: bool = Field(True, description="divide the error by sigma, as eq. 6 does")


class SourceMeanFlowStageConfig(MeanFlowStageConfig):
    """Stages `sampler-meanflow` and `baseline-meanflow`."""

    coupling: Literal["independent", "optimal-transport"] = "independent"


class DistillStageConfig(RefiningStageConfig):
    """Stage `distill`: the flow's own end points."""

    pairs: Positive = Field(16_000, description="start and end points that the trained flow makes, once")
    teacher_steps: Positive = Field(4, description="midpoint steps in which it makes them")
