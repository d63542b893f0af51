"""The couplings of the upsampler: y is a sample, x its low-resolution version, enlarged, with some noise.

upsampled           x = sqrt(a) * enlarged + sqrt(1 - a) * noise     the coupling flow (arXiv 2312.07360)
upsampled-gaussian  x ~ N(0, 1): the same at the last noise level    to compare
upsampled-plain     x = enlarged: the same at the first noise level  for regressions
upsampled-learned   x ~ N(mu, sigma^2), predicted from the enlarged  the learned prior of LeDiFlow

All are told the enlarged low-resolution sample without noise (`image`), and the noise level. Low-resolution
images are made here of y; of codec latents they come with the data, for a codec must make them.
"""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lediflow.conditions import Conditions
from lediflow.errors import UserError
from lediflow.pictures import to_float, to_pil
from lediflow.sources import BatchNoise
from lediflow.training.config import Config
from lediflow.training.couplings import COUPLINGS, PREVIEW_IMAGES, Batch, Context, Coupling
from lediflow.upsampling import MAX_NOISE_LEVEL, Enlarge, enlarged, noised, shrunk


def crop_size(config: Config) -> tuple[int, int]:
    """Return (H, W) of what the upsampler is trained on.

    Raises:
        UserError: it does not fit in the images, or the scale does not divide it.
    """
    upsampler, (_, h, w) = config.section("upsampler"), config.sample_shape
    if upsampler.crop is not None:
        if upsampler.crop > min(h, w):
            raise UserError(f"upsampler.crop {upsampler.crop} is larger than the sample of {h}x{w}")
        h = w = upsampler.crop
    if h % upsampler.scale or w % upsampler.scale:
        raise UserError(f"a sample of {h}x{w} is not divisible by upsampler.scale {upsampler.scale}")
    return h, w


class Upsampled(Coupling):
    """x = the enlarged low-resolution sample with some noise, y = the sample."""

    name = "upsampled"
    tells_labels = False

    def __init__(self, context: Context, settings: Any, **told: bool):
        super().__init__(context, settings, **told)
        self.how = context.config.section("upsampler")
        self.size = crop_size(context.config)
        if context.config.codec is not None:
            _check_pairs(context.data, self.how.scale, self.how.enlarge)

    @property
    def shape(self):
        """(C, H, W) of a crop."""
        return (self.context.config.sample_shape[0], *self.size)

    def levels(self, share: Tensor) -> Tensor:
        """Return noise levels for numbers on [0, 1), (B,)."""
        low, high = self.how.noise_levels
        return low + (share * (high + 1 - low)).floor().clamp_max(high - low)

    def targets(self, batch, noise):
        """The images or a square of each, their low-resolution versions enlarged, and the noise levels."""
        y, low = self._squares(batch, noise)
        if low is None:
            low = self._low_images(y, noise)
        return y, self._told(low, self.levels(noise.uniform("noise level")))

    def source(self, conditions, noise):
        """x = sqrt(a) * enlarged + sqrt(1 - a) * noise."""
        return noised(conditions["image"], conditions["noise_level"], noise), None

    def pairs(self, batch, noise):
        """Draw the pairs of a batch, with the same noise of sigma_min on both ends of each path."""
        pairs = super().pairs(batch, noise)
        if not self.how.sigma_min:
            return pairs
        drawn = self.how.sigma_min * noise.normal(self.shape, "path")
        return replace(pairs, x=pairs.x + drawn, y=pairs.y + drawn)

    def preview(self, carry):
        """Rows: samples, low resolution, x, and 1, 2, 4 steps from there."""
        data: Any = self.context.data
        device = self.context.device
        y = _middle(data.first(PREVIEW_IMAGES).to(device), self.size, self.how.scale)
        if self.context.config.codec is None:
            low = shrunk(y, self.how.scale, self.how.shrink)
        else:
            low = data.first_low(PREVIEW_IMAGES).to(device)
            ratio = self._ratio(low)
            low = _middle(low, [side // ratio for side in self.size], self.how.scale // ratio)
        told = self._told(low, self.levels(torch.full((len(y),), 0.5, device=device)))
        x, _ = self.source(told, self.preview_noise(len(y)))
        return [y, told["image"], x, *(carry(x, told, steps) for steps in (1, 2, 4))]

    def _told(self, low: Tensor, levels: Tensor) -> Conditions:
        way: Enlarge = "nearest" if self.how.enlarge == "nearest" else "bilinear"
        image = low if low.shape[2:] == self.size else enlarged(low, self.size, way)
        return Conditions(image=image, noise_level=levels)

    def _squares(self, batch: Batch, noise: BatchNoise) -> tuple[Tensor, Tensor | None]:
        """Return a square of each sample, and of its low-resolution version where the data has one."""
        y, low = batch["image"], batch.get("low")
        if tuple(y.shape[2:]) == self.size:
            return y, low
        scale = self.how.scale
        # where it begins, in low-resolution pixels, so that both are cut at the same place
        room = [(whole - side) // scale + 1 for whole, side in zip(y.shape[2:], self.size, strict=True)]
        starts = [
            (noise.uniform(stream) * count).long().clamp_max(count - 1).tolist()
            for stream, count in zip(("top", "left"), room, strict=True)
        ]
        corners = list(zip(*starts, strict=True))
        squares = _cut(y, corners, scale, self.size)
        if low is None:
            return squares, None
        ratio = self._ratio(low)
        return squares, _cut(low, corners, scale // ratio, [side // ratio for side in self.size])

    def _ratio(self, low: Tensor) -> int:
        """How many times the low-resolution samples of the data are smaller: 1 where they are enlarged."""
        return self.context.config.sample_shape[1] // low.shape[2]

    def _low_images(self, y: Tensor, noise: BatchNoise) -> Tensor:
        """Make images small, blurred before and compressed afterwards where that is asked."""
        how = self.how
        if how.blur:
            y = blurred(y, how.blur * how.scale * noise.uniform("blur"))
        low = shrunk(y, how.scale, how.shrink)
        if how.jpeg:
            quality = how.jpeg + (101 - how.jpeg) * noise.uniform("jpeg")
            low = compressed(low, quality.long().clamp_max(100).tolist())
        return low


class UpsampledGaussian(Upsampled):
    """x ~ N(0, 1): flow matching and diffusion, told the low resolution."""

    name = "upsampled-gaussian"

    def levels(self, share):
        """The last, where nothing but noise is left."""
        return torch.full_like(share, MAX_NOISE_LEVEL)


class UpsampledPlain(Upsampled):
    """x = the enlarged low-resolution sample."""

    name = "upsampled-plain"

    def levels(self, share):
        """The first, which is none."""
        return torch.zeros_like(share)

    def source(self, conditions, noise):
        """The enlarged sample itself."""
        return conditions["image"], None


class UpsampledLearned(UpsampledPlain):
    """x ~ N(mu, sigma^2), predicted from the enlarged low-resolution sample."""

    name = "upsampled-learned"

    def __init__(self, context: Context, settings: Any, **told: bool):
        super().__init__(context, settings, **told)
        self.prior = context.network("upsampler-prior")

    @torch.no_grad()
    def source(self, conditions, noise):
        """x = mu + sigma * noise, eq. 3 of LeDiFlow."""
        prior = self.prior(conditions["image"])
        return prior.at(noise), prior.std


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each of images (B, C, H, W) by a Gaussian of its own deviation (B,), in pixels."""
    b, c, h, w = images.shape
    reach = min(math.ceil(3 * float(sigma.max())), h - 1, w - 1)
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    lines = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3)[:, None]).square())
    lines = (lines / lines.sum(1, keepdim=True)).repeat_interleave(c, 0)[:, None]  # one for each channel
    flat = F.pad(images.reshape(1, b * c, h, w), (reach,) * 4, mode="reflect")
    flat = F.conv2d(flat, lines[:, :, None, :], groups=b * c)
    return F.conv2d(flat, lines[:, :, :, None], groups=b * c).view(b, c, h, w)


def compressed(images: Tensor, quality: list[int]) -> Tensor:
    """Store each of images (B, C, H, W) in [-1, 1] as a JPEG of its quality, and read it again."""
    found = []
    for picture, q in zip(to_pil(images), quality, strict=True):
        stored = io.BytesIO()
        picture.save(stored, "JPEG", quality=max(1, q))
        pixels = np.array(Image.open(stored, formats=("JPEG",)))
        found.append(torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).movedim(-1, 0))
    return to_float(torch.stack(found)).to(images.device)


def _cut(images: Tensor, corners: list[tuple[int, ...]], unit: int, size: Any) -> Tensor:
    """Cut a rectangle out of each image, whose corner is given in multiples of `unit`."""
    h, w = size
    return torch.stack(
        [
            image[:, top * unit : top * unit + h, left * unit : left * unit + w]
            for image, (top, left) in zip(images, corners, strict=True)
        ]
    )


def _middle(images: Tensor, size: Any, unit: int) -> Tensor:
    """Return the middle of images, or what lies just before, where the middle is between two units."""
    top, left = (
        (whole - side) // 2 // unit * unit for whole, side in zip(images.shape[2:], size, strict=True)
    )
    return images[:, :, top : top + size[0], left : left + size[1]]


def _check_pairs(data: Any, scale: int, enlarge: str) -> None:
    """Refuse latents without low-resolution partners, or with others than the config asks for.

    Raises:
        UserError: with the option of `lediflow encode` that makes them.
    """
    there = getattr(data, "pairs", None)
    if there is None:
        raise UserError(
            "these latents have no low-resolution partners; encode the images with --pairs LOW:HIGH, such as "
            "--pairs 256:1024, or let training encode them (data.encode=true)"
        )
    low, high, way = there
    if high != low * scale:
        raise UserError(f"these latents are pairs of {low} and {high} px, and upsampler.scale is {scale}")
    if (way == "pixels") != (enlarge == "pixels"):
        raise UserError(
            f"upsampler.enlarge is {enlarge}, and these latents were encoded for {way}; encode the images "
            f"with --enlarge {'pixels' if enlarge == 'pixels' else 'latents'}, or change the setting"
        )


COUPLINGS.update({c.name: c for c in (Upsampled, UpsampledGaussian, UpsampledPlain, UpsampledLearned)})
