"""Every setting of a run, typed. A config comes from a preset or a YAML file plus `--set a.b=c`.

An unknown key, a wrong type or an impossible value is refused by name, with the nearest valid name. A preset
or file may start from another with `extends`. This file imports no torch, for the command line reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model, field_validator

from lediflow.choices import Compile, Precision, Tracker
from lediflow.errors import UserError, nearest
from lediflow.training.config_files import apply_override, read_tree, read_yaml, set_value
from lediflow.training.settings import (
    AuxiliaryConfig,
    AverageConfig,
    ClustersConfig,
    CodecConfig,
    Count,
    DataConfig,
    FlowConfig,
    Positive,
    Range,
    SamplerConfig,
    Section,
    TextConfig,
)
from lediflow.training.stages import SECTIONS, STAGES, StageSpec, check_stage, in_order
from lediflow.training.upsampler_settings import UpsamplerConfig

FORMAT = 2  # of run folders; one of another format is refused


class TrainingConfig(Section):
    """What all stages share; `load_config` adds a section for each stage of the table (stages.py)."""

    stages: tuple[str, ...] = Field(
        ("auxiliary", "clusters", "flow", "sampler", "meanflow", "sampler-meanflow"),
        min_length=1,
        description="what `lediflow train` trains when no --stage is given",
    )
    seed: int = Field(0, description="of weights, order, noise: the same seed trains the same networks")
    precision: Precision = Field(
        "auto", description="auto: bf16 where the device multiplies it, else fp32; fp16 needs a GPU"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="many processes: whole copies of the weights (DDP) or shards of them (FSDP2)"
    )
    accumulate: Positive = Field(1, description="parts in which a process works on its batch, to save memory")
    label_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of classes, clusters and texts left out, which guidance needs"
    )
    ema: tuple[AverageConfig, ...] = Field(
        (AverageConfig(),), min_length=1, description="averages of the weights; the first makes the pipeline"
    )
    spike: float = Field(
        50.0, ge=0, description="skip a step this many mean deviations above the last losses; 0: never"
    )
    compile: Compile = Field(
        "none",
        description="torch.compile the repeated block or the whole network: slow at first, then faster",
    )
    gradient_checkpointing: bool = Field(
        False, description="keep no activations inside blocks: less memory, a third more work"
    )
    log_every: Positive = Field(20, description="steps between lines of metrics.jsonl")
    preview_every: Positive = Field(500, description="steps between pictures in previews/")
    checkpoint_every: Positive = Field(500, description="steps between checkpoints")
    keep_checkpoints: Positive = Field(2, description="how many of the last checkpoints stay")
    keep_every: Count = Field(0, description="also keep every checkpoint at a multiple of this step; 0: none")
    tracker: Tracker = Field("tensorboard", description="where the curves go besides metrics.jsonl")

    @field_validator("stages")
    @classmethod
    def _known(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        for name in stages:
            check_stage(name)
        return stages

    @field_validator("ema")
    @classmethod
    def _different_names(cls, ema: tuple[AverageConfig, ...]) -> tuple[AverageConfig, ...]:
        if len({average.name for average in ema}) < len(ema):
            raise ValueError("every average needs a name of its own")
        return ema


class Config(Section):
    """All settings of a run; what a preset, a YAML file and a run's config.yaml hold."""

    format: Literal[2] = Field(2, description="of the run folder; do not change it")
    description: str = Field("", description="what it is for, in words")
    needs: str = Field("", description="memory and time, in words")
    measured: str = Field("", description="what it gave, and the command that measured it")
    data: DataConfig = DataConfig()
    codec: CodecConfig | None = Field(None, description="null trains on pixels")
    auxiliary: AuxiliaryConfig | None = None
    flow: FlowConfig | None = None
    sampler: SamplerConfig | None = None
    upsampler: UpsamplerConfig | None = None
    clusters: ClustersConfig = ClustersConfig()
    text: TextConfig = TextConfig()
    temperature: float = Field(
        1.0,
        ge=0,
        le=1.5,
        description="of the learned prior when images are made, unless a request says another: x = mu + "
        "temperature * sigma * noise",
    )
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

    def section(self, name: str) -> Any:
        """Return the settings of a network that this config must have.

        Raises:
            UserError: it has not.
        """
        section = getattr(self, name)
        if section is None:
            raise UserError(f"this config has no section {name!r}, so what it describes cannot be trained")
        return section

    def lacks(self, spec: StageSpec) -> list[str]:
        """Return the sections that a stage's network needs and that are not there."""
        return [name for name in SECTIONS.get(spec.network, ()) if getattr(self, name) is None]

    def stage(self, name: str) -> Any:
        """Return the settings of the stage `name`."""
        return getattr(self.training, check_stage(name).section)

    def has(self, spec: StageSpec) -> bool:
        """Whether there is anything to learn in a stage, with these settings."""
        value: Any = self
        for part in (spec.only_with or "").split(".") if spec.only_with else ():
            value = getattr(value, part)
        return value != 0

    def chosen(self, stages: Iterable[str] | None) -> list[StageSpec]:
        """Return the stages to train in their order; for None those of `training.stages` that can learn.

        Raises:
            UserError: an unknown stage, or one with nothing to learn.
        """
        if stages is None:
            return [spec for spec in in_order(self.training.stages) if self.has(spec)]
        chosen = in_order(stages)
        for spec in chosen:
            if not self.has(spec):
                raise UserError(f"stage {spec.name} has nothing to learn: {spec.only_with} is 0")
        return chosen

    def uses(self, spec: StageSpec) -> tuple[str, ...]:
        """The stages whose trained networks a stage uses."""
        clusters = ("auxiliary", "clusters") if self.clusters.told(spec.network) else ()
        return tuple(dict.fromkeys((*spec.needs, *clusters)))

    def relies_on(self, spec: StageSpec) -> tuple[str, ...]:
        """The stages that must be trained before a stage: what it needs, starts from, and is guided by."""
        settings, found = self.stage(spec.name), list(self.uses(spec))
        strengths = self.strengths(spec)
        if spec.starts_from and (strengths or not getattr(settings, "from_scratch", False)):
            found.append(spec.starts_from)
        if spec.weak and "autoguidance" in strengths:
            found.append(spec.weak)
        return tuple(found)

    def strengths(self, spec: StageSpec) -> dict[str, Range]:
        """The kinds of guidance that a stage's network has learned, and their ranges.

        A stage that sets none of its own keeps those of the network that it starts from.
        """
        settings = self.stage(spec.name)
        if hasattr(settings, "strengths") or spec.starts_from is None:
            return getattr(settings, "strengths", {})
        return self.strengths(check_stage(spec.starts_from))

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
    "temperature",
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
)


def config_class() -> type[Config]:
    """Return `Config` with a section of settings for each stage that the table has now."""
    return _with_sections(tuple(STAGES.values()))


@lru_cache(maxsize=8)
def _with_sections(specs: tuple[StageSpec, ...]) -> type[Config]:
    sections: dict[str, Any] = {
        spec.section: (spec.settings, Field(spec.settings(), description=spec.learns)) for spec in specs
    }
    training: Any = create_model("TrainingConfig", __base__=TrainingConfig, **sections)
    return create_model("Config", __base__=Config, training=(training, training()))


def load_config(
    source: str | Path,
    overrides: Iterable[str] | None = None,
    *,
    values: Mapping[str, Any] | None = None,
) -> Config:
    """Read a preset by name or a YAML file by path, and change some settings.

    Args:
        source: name of a preset, or path of a YAML file.
        overrides: "a.b=value" each, the value as in YAML.
        values: the same as Python values, by "a.b"; None leaves a setting as it is.

    Raises:
        UserError: no such preset or file, not YAML, or a setting that is unknown or impossible.
    """
    tree = read_tree(source)
    for override in overrides or []:
        apply_override(tree, override)
    for key, value in (values or {}).items():
        if value is not None:
            set_value(tree, key, value)
    try:
        config = config_class().model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_explain(tree, e) for e in error.errors())) from None
    if config.data.augment and config.codec:
        raise UserError(f"{source}: data.augment changes pixels, and latents have none; leave it out")
    check_sections(config, [STAGES[name] for name in config.training.stages], f"{source}: ")
    return config


def check_sections(config: Config, stages: Iterable[StageSpec], where: str = "") -> None:
    """Refuse stages whose networks the config says nothing of.

    Raises:
        UserError: naming the missing section and the stage.
    """
    for spec in stages:
        for missing in config.lacks(spec):
            raise UserError(f"{where}missing key {missing!r}, which stage {spec.name} needs")


def load_run_config(run: Path) -> Config:
    """Read the config.yaml of a run folder.

    Raises:
        UserError: it was written by a version whose run folders this one does not read, or it is damaged.
    """
    path = run / "config.yaml"
    if read_yaml(path).get("format") != FORMAT:
        raise UserError(
            f"{run} was made by another version of lediflow, and its format ({path.name} says no "
            f"`format: {FORMAT}`) cannot be read here; train again, into another --output"
        )
    return load_config(path)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return {key: (old, new)} for each setting in which a run and its continuation must not differ."""
    a, b = (_flatten(c.model_dump(mode="json")) for c in (old, new))
    free = {*FREE_KEYS, *(f"training.{spec.section}.steps" for spec in STAGES.values())}
    return {k: (a.get(k), b.get(k)) for k in a | b if a.get(k) != b.get(k) and k not in free}


def _explain(tree: dict[str, Any], error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(key, all_keys(config_class()))}"
    if error["type"] == "missing":
        return f"missing key {key!r}"
    return f"{key}: {error['msg'].lower()}, got {error['input']!r}"


def all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the keys of a section and of those below it, as `--set` takes them."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += all_keys(kind, f"{prefix}{name}.")
    return keys


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
