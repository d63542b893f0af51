"""The section `upsampler` of a config: what the coupling flow is trained on, and its networks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lediflow.training.settings import Count, LevelsConfig, Positive, Section

Level = Annotated[int, Field(ge=0, le=999)]


class UNetConfig(Section):
    """A U-Net; the defaults are Table 8's small one, 113M parameters on latents."""

    base_width: Positive = Field(128, description="channels of the first level, a multiple of 32")
    multipliers: tuple[Positive, ...] = Field(
        (1, 2, 3, 4), description="width of each level over base_width, finest first"
    )
    depth: Positive = Field(3, description="residual blocks of a level on the way down")
    attention_factors: tuple[Positive, ...] = Field(
        (8, 16), description="attention in the levels that are this many times coarser than the sample"
    )
    heads: Positive = Field(4, description="of the attention, in every level")
    d_head: Positive = Field(64, description="width of an attention head")
    time_scale: float = Field(1.0, gt=0, description="t times this goes into sinusoids")


class TransformerConfig(LevelsConfig):
    """HDiT."""

    mapping_width: Positive = Field(256, description="width of the vector of conditions")
    mapping_depth: Count = Field(2, description="blocks of the mapping network")


class PriorConfig(Section):
    """The small network that predicts where the flow starts, from the low-resolution sample."""

    width: Positive = Field(64, description="channels")
    depth: Positive = Field(4, description="residual blocks, at the low resolution")


class UpsamplerConfig(Section):
    """The coupling flow: from an enlarged low-resolution sample to the high-resolution one."""

    scale: Annotated[int, Field(ge=2)] = Field(4, description="times that each side grows")
    enlarge: Literal["nearest", "bilinear", "pixels"] = Field(
        "nearest", description="how the low-resolution sample gets the size of the other; pixels: as an image"
    )
    noise_level: Level | tuple[Level, Level] = Field(
        200, description="noise on the start, 0 to 999 of the cosine schedule; or a range to draw from"
    )
    sigma_min: float = Field(0.0, ge=0, description="noise of this deviation on the whole path")
    crop: Positive | None = Field(
        None, description="side of the squares to train on, pixels or latents; null: the whole"
    )
    shrink: Literal["area", "bicubic"] = Field("area", description="how low-resolution images are made")
    blur: float = Field(
        0.0, ge=0, description="blur images first, by up to this deviation in low-resolution pixels"
    )
    jpeg: Annotated[int, Field(ge=0, le=100)] = Field(
        0, description="compress low-resolution images as JPEG, with this quality or better; 0: do not"
    )
    unet: UNetConfig | None = Field(None, description="a U-Net; give this or transformer")
    transformer: TransformerConfig | None = Field(None, description="HDiT; give this or unet")
    prior: PriorConfig = PriorConfig()

    @model_validator(mode="after")
    def _fits(self) -> UpsamplerConfig:
        if (self.unet is None) == (self.transformer is None):
            raise ValueError("give either unet or transformer")
        if self.crop is not None and self.crop % self.scale:
            raise ValueError(f"crop {self.crop} is not divisible by scale {self.scale}")
        low, high = self.noise_levels
        if low > high:
            raise ValueError(f"noise_level must rise, not fall from {low} to {high}")
        return self

    @property
    def noise_levels(self) -> tuple[int, int]:
        """The range of the noise level, both ends included."""
        level = self.noise_level
        return (level, level) if isinstance(level, int) else level
