"""Every setting of a run, typed. A config comes from a preset or a YAML file plus `--set a.b=c`.

An unknown key, a wrong type or an impossible value is refused by name, with the nearest valid name.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from lediflow.errors import UserError, nearest
from lediflow.precision import Precision
from lediflow.training.stage_config import (
    STAGES,
    AuxiliaryStageConfig,
    Count,
    CoupledStageConfig,
    DistillStageConfig,
    FlowStageConfig,
    Positive,
    PriorMeanFlowStageConfig,
    Section,
    SourceMeanFlowStageConfig,
    StageConfig,
    StageName,
    section,
)

Size = Positive | tuple[Positive, Positive]


class DataConfig(Section):
    """Which images, and how they are brought to size."""

    train: str | None = Field(
        None,
        description="folder of images, Parquet, Arrow or tar files, Hub dataset owner/name[:config], "
        "'digits', or with a codec the folder that `lediflow encode` wrote",
    )
    validation: str | None = Field(None, description="held-out images; default: the split of that name")
    image_size: Positive = Field(32, description="side of the square images, pixels")
    channels: Literal[1, 3] = Field(3, description="1 for grey, 3 for RGB")
    classes: Count = Field(0, description="number of classes; 0 trains without labels")
    crop: Literal["center", "random"] = Field("center", description="which square of an oblong image")
    flip: bool = Field(True, description="mirror half of the images")
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

    patch_size: Positive = 1
    widths: tuple[Positive, ...] = Field(..., description="of the levels, finest first")
    depths: tuple[Positive, ...] = Field(..., description="blocks per level")
    d_head: Positive = 64
    ff_factor: float = Field(3.0, gt=0, description="d_ff = ff_factor * width")
    kernel_size: Positive = Field(7, description="side of the attention neighbourhood, odd")
    global_levels: Count = Field(1, description="how many of the lowest levels attend globally")


class AuxiliaryConfig(LevelsConfig):
    """The auxiliary model, theta_E and theta_D."""

    decoder_widths: tuple[Positive, ...] | None = Field(None, description="default: the encoder's")
    decoder_depths: tuple[Positive, ...] | None = Field(None, description="default: the encoder's")
    mapping_width: Count = Field(
        0, description="z also scales the decoder's norms through a mapping network; 0: it does not"
    )
    mapping_depth: Count = 0
    latent_channels: Positive = 4
    latent_size: Size = 8


class SamplerConfig(LevelsConfig):
    """The latent sampler, theta_L, a flow on z."""

    mapping_width: Positive = 256
    mapping_depth: Count = 0


class FlowConfig(LevelsConfig):
    """The flow model theta_FM; the baseline is the same network without z."""

    mapping_width: Positive = 256
    mapping_depth: Count = 2
    latent_conditioning: Literal["concat", "mapping"] = Field(
        "concat", description="how z enters: beside the patches, or through the mapping network"
    )


class AverageConfig(Section):
    """One exponential moving average (EMA) of the weights."""

    name: str = Field("power", pattern="^[a-z0-9][a-z0-9-]*$")
    power: float = Field(2 / 3, gt=0, description="at step n the old average weighs 1 - n^(-power)")
    max_decay: float = Field(0.9999, ge=0, lt=1, description="cap of that")
    half_life: float | None = Field(
        None, gt=0, description="instead of a power: after how many images weights count half"
    )


class TrainingConfig(Section):
    """What all stages share, and each stage's own settings."""

    stages: tuple[StageName, ...] = Field(
        ("auxiliary", "flow", "sampler", "baseline"),
        min_length=1,
        description="what `lediflow train` trains when no --stage is given",
    )
    seed: int = 0
    precision: Precision = Field(
        "auto", description="auto: bf16 where the device multiplies it, else fp32; fp16 needs a GPU"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="many processes: whole copies of the weights (DDP) or shards of them (FSDP2)"
    )
    accumulate: Positive = Field(1, description="parts in which a process works on its batch, to save memory")
    label_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of labels left out, which guidance needs; with data.classes"
    )
    ema: tuple[AverageConfig, ...] = Field(
        (AverageConfig(),), min_length=1, description="averages of the weights; the first makes the pipeline"
    )
    spike: float = Field(
        50.0, ge=0, description="skip a step this many mean deviations above the last losses; 0: never"
    )
    compile: Literal["none", "blocks", "model"] = Field(
        "none",
        description="torch.compile the repeated block or the whole network: slow at first, then faster",
    )
    gradient_checkpointing: bool = Field(
        False, description="keep no activations inside blocks: less memory, a third more work"
    )
    log_every: Positive = 20
    preview_every: Positive = 500
    checkpoint_every: Positive = 500
    keep_checkpoints: Positive = 2
    keep_every: Count = Field(0, description="also keep every checkpoint at a multiple of this step; 0: none")
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    auxiliary: AuxiliaryStageConfig = AuxiliaryStageConfig()
    flow: FlowStageConfig = FlowStageConfig()
    sampler: CoupledStageConfig = CoupledStageConfig()
    baseline: CoupledStageConfig = CoupledStageConfig()
    meanflow: PriorMeanFlowStageConfig = PriorMeanFlowStageConfig()
    sampler_meanflow: SourceMeanFlowStageConfig = SourceMeanFlowStageConfig()
    baseline_meanflow: SourceMeanFlowStageConfig = SourceMeanFlowStageConfig()
    distill: DistillStageConfig = DistillStageConfig()

    @field_validator("ema")
    @classmethod
    def _different_names(cls, ema: tuple[AverageConfig, ...]) -> tuple[AverageConfig, ...]:
        if len({average.name for average in ema}) < len(ema):
            raise ValueError("every average needs a name of its own")
        return ema


class Config(Section):
    """All settings of a run; what a preset, a YAML file and a run's config.yaml hold."""

    description: str = ""
    needs: str = Field("", description="memory and time, in words")
    measured: str = Field("", description="what it gave, and the command that measured it")
    data: DataConfig = DataConfig()
    codec: CodecConfig | None = Field(None, description="null trains on pixels")
    auxiliary: AuxiliaryConfig
    flow: FlowConfig
    sampler: SamplerConfig
    training: TrainingConfig = TrainingConfig()

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the flow carries: images, or latents of the codec."""
        size = self.data.image_size
        if self.codec is None:
            return self.data.channels, size, size
        if size % self.codec.factor:
            raise UserError(f"data.image_size {size} is not divisible by codec.factor {self.codec.factor}")
        return self.codec.channels, size // self.codec.factor, size // self.codec.factor

    def stage(self, name: StageName) -> StageConfig:
        """Return the settings of the stage `name`."""
        stage: StageConfig = getattr(self.training, section(name))
        return stage

    def to_yaml(self) -> str:
        """Return every setting as YAML, in the order of the classes."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


# What may change between a run and its continuation without making it another run.
FREE_KEYS = (
    "description",
    "needs",
    "measured",
    "data.train",
    "data.validation",
    "data.workers",
    "data.cache_gb",
    "data.max_broken",
    "training.compile",
    "training.gradient_checkpointing",
    "training.log_every",
    "training.preview_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.keep_every",
    "training.tracker",
    "training.parallel",
    "training.accumulate",
    "training.spike",
    "training.stages",
    *(f"training.{section(stage)}.steps" for stage in STAGES),
)


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package, sorted."""
    return sorted(
        p.name.removesuffix(".yaml") for p in _preset_folder().iterdir() if p.name.endswith(".yaml")
    )


def load_config(source: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a preset by name or a YAML file by path, and apply overrides `a.b=value` (value as in YAML).

    Raises:
        UserError: no such preset or file, not YAML, or a setting that is unknown or impossible.
    """
    tree = _read_tree(source)
    for override in overrides or []:
        _apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_explain(tree, e) for e in error.errors())) from None


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return {key: (old, new)} for each setting in which a run and its continuation must not differ."""
    a, b = (_flatten(c.model_dump(mode="json")) for c in (old, new))
    return {k: (a.get(k), b.get(k)) for k in a | b if a.get(k) != b.get(k) and k not in FREE_KEYS}


def _preset_folder():
    return resources.files("lediflow") / "presets"


def _read_tree(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"no config file {source}")
        text = path.read_text(encoding="utf-8")
    else:
        names = preset_names()
        if str(source) not in names:
            raise UserError(
                f"unknown preset {str(source)!r}{nearest(str(source), names)}; "
                f"give a YAML file or one of {', '.join(names)}"
            )
        text = (_preset_folder() / f"{source}.yaml").read_text(encoding="utf-8")
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{source} must hold settings as `key: value`")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override!r}: write it as key.subkey=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override!r}: {text!r} is not a valid value") from None
    if isinstance(value, str):
        value = _number(value)
    *parents, last = key.strip().split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {key}: {parent!r} is a value, it has no keys below it")
    node[last] = value


def _number(text: str) -> str | float:
    # YAML 1.1 reads 1e-3 as a string, which nobody means
    try:
        return float(text)
    except ValueError:
        return text


def _explain(tree: dict[str, Any], error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(key, _all_keys(Config))}"
    if error["type"] == "missing":
        return f"missing key {key!r}"
    return f"{key}: {error['msg'].lower()}, got {error['input']!r}"


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += _all_keys(kind, f"{prefix}{name}.")
    return keys


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
