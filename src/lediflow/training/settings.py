"""The sections of a config: data, codec, networks, averages, and the settings of each kind of stage."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Depth = Annotated[int, Field(ge=1, le=256)]  # more takes minutes to build; far above any preset's 16


class Section(BaseModel):
    """Settings that refuse what they do not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Size = Positive | tuple[Positive, Positive]


class AugmentConfig(Section):
    """Pictures shifted and turned in hue, for small sets; sampler and baseline are told of it."""

    share: float = Field(0.25, gt=0, le=1, description="of the pictures that are changed")
    shift: float = Field(0.06, ge=0, le=0.5, description="largest shift, as a share of the side")
    hue: float = Field(0.05, ge=0, le=0.5, description="largest turn of the hue, as a share of the circle")


class DataConfig(Section):
    """Which images, and how they are brought to size."""

    train: str | None = Field(
        None,
        description="folder of images, Parquet, Arrow or tar files, Hub dataset "
        "owner/name[:config][@revision], 'digits', or with a codec the folder that `lediflow encode` wrote",
    )
    validation: str | None = Field(None, description="held-out images; default: the split of that name")
    image_size: Positive = Field(32, description="side of the square images, pixels")
    channels: Literal[1, 3] = Field(3, description="1 for grey, 3 for RGB")
    classes: Count = Field(0, description="number of classes; 0 trains without labels")
    crop: Literal["center", "random"] = Field("center", description="which square of an oblong image")
    flip: bool = Field(True, description="mirror half of the images")
    augment: AugmentConfig | None = Field(
        None, description="shift some images and turn their hues: `--set data.augment={}`; null: none do"
    )
    encode: bool = Field(
        False, description="with a codec: train holds images, which are encoded again at every step"
    )
    streaming: bool = Field(False, description="read in the order of storage, for sets too large to index")
    shuffle_block: Positive = Field(1000, description="stored images a worker shuffles at a time, streaming")
    workers: Count = Field(0, description="processes that decode images; 0 decodes in the main process")
    cache_gb: float = Field(1.0, ge=0, description="keep decoded images in memory when they fit, GB")
    max_broken: float = Field(0.5, ge=0, le=1, description="share of unreadable images that stops the run")


class CodecConfig(Section):
    """The autoencoder in whose latents the flow works (a diffusers AutoencoderKL or AutoencoderTiny)."""

    model: str = Field(..., description="local folder or Hub id")
    factor: Positive = Field(8, description="pixels of a side that become one latent")
    channels: Positive = Field(4, description="of the latents")


class LevelsConfig(Section):
    """Sizes that every network has."""

    patch_size: Positive = Field(1, description="side of the square of pixels that makes a token")
    widths: tuple[Positive, ...] = Field(..., description="of the levels, finest first")
    depths: tuple[Depth, ...] = Field(..., max_length=16, description="blocks per level, at most 256")
    d_head: Positive = Field(64, description="width of an attention head")
    ff_factor: float = Field(3.0, gt=0, description="d_ff = ff_factor * width")
    kernel_size: Positive = Field(7, description="side of the attention neighbourhood, odd")
    global_levels: Count = Field(1, description="how many of the lowest levels attend globally")


class AuxiliaryConfig(LevelsConfig):
    """The auxiliary model, theta_E and theta_D."""

    decoder_widths: tuple[Positive, ...] | None = Field(None, description="default: the encoder's")
    decoder_depths: tuple[Depth, ...] | None = Field(
        None, max_length=16, description="default: the encoder's"
    )
    mapping_width: Count = Field(
        0, description="z also scales the decoder's norms through a mapping network; 0: it does not"
    )
    mapping_depth: Count = Field(0, le=256, description="blocks of that mapping network")
    z_channels: Positive = Field(4, description="channels of z")
    z_size: Size = Field(8, description="side of z, or [height, width]")


class SamplerConfig(LevelsConfig):
    """The latent sampler, theta_L, a flow on z."""

    mapping_width: Positive = Field(256, description="width of the vector of conditions")
    mapping_depth: Count = Field(0, le=256, description="blocks of the mapping network")


class FlowConfig(LevelsConfig):
    """The flow model theta_FM; the baseline is the same network without z."""

    mapping_width: Positive = Field(256, description="width of the vector of conditions")
    mapping_depth: Count = Field(2, le=256, description="blocks of the mapping network")
    z_conditioning: Literal["concat", "mapping"] = Field(
        "concat", description="how z enters: beside the patches, or through the mapping network"
    )


class ClustersConfig(Section):
    """Clusters of z, as labels that nobody had to give (stage `clusters`)."""

    count: Count | Literal["auto"] = Field(
        0,
        description="how many; 0: none; auto: the power of two nearest to 0.4 times the root of the number "
        "of images",
    )
    networks: tuple[Literal["sampler", "flow", "baseline"], ...] = Field(
        ("sampler",), min_length=1, description="which networks are told an image's cluster"
    )

    @property
    def number(self) -> int:
        """The count; for "auto", before it is settled, 32."""
        return 32 if self.count == "auto" else self.count

    def told(self, network: str) -> int:
        """Number of clusters that a network is told of, 0 for none."""
        return self.number if network in self.networks else 0


class TextConfig(Section):
    """Words: what an image is told to be in a text, beside classes and clusters."""

    encoder: str | None = Field(
        None,
        description="null: no text; characters: a small encoder that is trained along, of any words; else a "
        "frozen text model of transformers (CLIP, T5), by folder or Hub id owner/name[@revision]",
    )
    column: str | None = Field(
        None,
        description="of the data that holds the texts; a+b joins two; null: text or caption",
    )
    networks: tuple[Literal["sampler", "flow", "baseline"], ...] = Field(
        ("sampler",), min_length=1, description="which networks are told an image's text"
    )
    max_length: Annotated[int, Field(ge=1, le=1024)] = Field(
        64,
        description="how much of a text is looked at: bytes, or tokens of a frozen encoder, which may itself "
        "read fewer; what is longer is cut",
    )
    width: Positive = Field(
        64, description="features of a word and of a piece of one; a frozen encoder has its own"
    )
    tokens: bool = Field(
        False,
        description="the network's lowest level attends to the tokens of a text too; needs a frozen encoder",
    )
    dropout: float = Field(
        0.2,
        ge=0,
        lt=0.5,
        description="share in which the text is left out and class and cluster stay, and likewise the other "
        "way round, beside training.label_dropout, which leaves out all",
    )
    word_dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of words left out of the texts; a frozen encoder reads whole texts",
    )

    @property
    def columns(self) -> tuple[str, ...]:
        """Names that the column of texts may have, empty where no network is told a text."""
        if self.encoder is None:
            return ()
        return ("text", "caption") if self.column is None else (self.column,)

    @model_validator(mode="after")
    def _tokens_of_a_frozen_encoder(self) -> TextConfig:
        if self.tokens and not self.frozen:
            raise ValueError("text.tokens needs a frozen encoder (text.encoder)")
        return self

    @property
    def frozen(self) -> bool:
        """Whether the encoder is one that is not trained."""
        return self.encoder not in (None, "characters")

    def told(self, network: str) -> bool:
        """Whether a network is told the text of an image."""
        return self.encoder is not None and network in self.networks


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    if not (0 <= low <= 1 <= high < math.inf and low < high):  # 1, no guidance, can always be asked for
        raise ValueError("must be [low, high] with 0 <= low <= 1 <= high and low < high")
    return bounds


Range = Annotated[tuple[float, float], AfterValidator(_ascending)]


class AverageConfig(Section):
    """One exponential moving average (EMA) of the weights."""

    name: str = Field("power", description="of its files and folders", pattern="^[a-z0-9][a-z0-9-]*$")
    power: float = Field(2 / 3, gt=0, description="at step n the old average weighs 1 - n^(-power)")
    max_decay: float = Field(0.9999, ge=0, lt=1, description="cap of that")
    half_life: float | None = Field(
        None, gt=0, description="instead of a power: after how many images weights count half"
    )


class StageConfig(Section):
    """How one stage is optimised (AdamW)."""

    steps: Positive = Field(1000, description="how many steps the stage trains")
    batch_size: Positive = Field(64, description="images of a step, over all processes")
    learning_rate: float = Field(3e-4, gt=0, description="of AdamW, after warm-up")
    warmup_steps: Count = Field(100, description="linear warm-up")
    schedule: Literal["constant", "cosine", "linear", "inverse-sqrt"] = Field(
        "constant", description="after warm-up; cosine and linear end at 0"
    )
    betas: tuple[float, float] = Field((0.9, 0.99), description="of AdamW")
    weight_decay: float = Field(1e-2, ge=0, description="on matrices only")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")


class ClustersStageConfig(Section):
    """Stage `clusters`."""

    steps: ClassVar[int] = 1

    images: Positive = Field(50_000, description="k-means looks at so many images at most")


class AuxiliaryStageConfig(StageConfig):
    """Stage `auxiliary`."""

    beta: float = Field(
        1.0, ge=0, description="weight of the KL term, 1 is the ELBO (see gaussian.elbo_loss)"
    )
    variance_power: float = Field(
        0.0,
        ge=0,
        le=1,
        description="weigh each element's VGL by sigma^(2 p): 0 is the paper's; with 0.5 an even ground does "
        "not outweigh the colours of what is on it",
    )
    standardize_z: bool = Field(
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
        description="optimal-transport deals out a batch's noise so that its paths are shortest (OT-CFM), "
        "within each class; with several processes or accumulate, within each part of the batch",
    )


class WeakSettings(StageConfig):
    """What the stages of worse networks, for autoguidance, share."""

    steps: Positive = Field(100, description="an eighth of the better network's, or less")
    early: bool = Field(
        False,
        description="take the average of the better network's weights after `steps` steps of its training, "
        "instead of training one; the other settings of this stage then have no effect",
    )
    schedule: Literal["constant", "cosine", "linear", "inverse-sqrt"] = Field(
        "cosine", description="after warm-up; cosine and linear end at 0"
    )


class WeakFlowStageConfig(WeakSettings, FlowStageConfig):
    """Stage `weak-flow`: the flow, trained so shortly that it is bad."""


class WeakCoupledStageConfig(WeakSettings, CoupledStageConfig):
    """Stages `weak-sampler` and `weak-baseline`, likewise."""


class RefiningStageConfig(StageConfig):
    """A stage that starts from a trained one."""

    guidance: Range | None = Field(
        None,
        description="[low, high]: learn the velocity guided by class, cluster and text, for every strength "
        "between; one evaluation then, instead of two; null: without",
    )
    autoguidance: Range | None = Field(
        None,
        description="[low, high]: learn the velocity guided away from the weak network's (stage weak-flow, "
        "weak-sampler or weak-baseline), likewise",
    )

    @property
    def strengths(self) -> dict[str, Range]:
        """The kinds of guidance that are learned, and their ranges."""
        ranges = {"guidance": self.guidance, "autoguidance": self.autoguidance}
        return {name: found for name, found in ranges.items() if found is not None}


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

    coupling: Literal["independent", "optimal-transport"] = Field(
        "independent", description="as in the stage that it starts from"
    )


class EndsStageConfig(StageConfig):
    """Stage `meanflow-distill`: where several steps of the average velocity end."""

    pairs: Positive = Field(16_000, description="start and end points that the trained network makes, once")
    teacher_steps: Positive = Field(4, description="steps in which it makes them")
    detail: float = Field(
        0.0,
        ge=0,
        le=1,
        description="0 is the squared error; towards 1 an error counts more at frequencies that images have "
        "little of: fine detail",
    )


class DistillStageConfig(EndsStageConfig, RefiningStageConfig):
    """Stage `distill`: where midpoint steps of the flow end."""
