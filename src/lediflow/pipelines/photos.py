"""Photos of any size before and after the model: what a user hands over, the region that the model sees, and
how what it made is pasted back.

A photo stays in its own pixels, uint8 or float. Only the region is resampled, and whatever the mask leaves
alone is never computed again: it is the photo's own value, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from lediflow.data.decode import eight_bit
from lediflow.data.opening import BrokenImageError, Home, load_bounded, opened, row_path
from lediflow.errors import UserError
from lediflow.files import quoted
from lediflow.pictures import to_float, to_uint8

Picture = Any  # a PIL image, an array (H, W) or (H, W, C) of uint8, or a tensor (C, H, W) or (1, C, H, W)


def open_photo(path: Path) -> Image.Image:
    """Open a picture file at its full size, upright, in its own mode.

    Raises:
        UserError: it is missing, no picture, damaged, animated, or too large to work on.
    """
    record = {"bytes": None, "path": row_path(path.absolute())}
    try:
        with opened(record, Home(listed=True)) as (picture, _):
            _load(picture)
            return ImageOps.exif_transpose(picture).copy()
    except BrokenImageError as error:
        raise UserError(f"cannot use {quoted(path)}: {error}") from None


def listed_photo(path: Path) -> IO[bytes]:
    """Open a picture's file for reading, if it is a plain file and not too large.

    Raises:
        BrokenImageError: it is not.
        OSError: as the system says.
    """
    return Home(listed=True).open(row_path(path.absolute()))


def photo_tensor(image: Picture, channels: Literal[1, 3]) -> Tensor:
    """Return the pixels of an image as (channels, H, W): uint8, or of a tensor its own floats in [-1, 1].

    Args:
        image: PIL image, uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or float tensor (C, H, W) or
            (1, C, H, W) in [-1, 1].
        channels: of the model, 1 for grey and 3 for colour. Transparent pixels are laid on white.

    Raises:
        UserError: it is none of these, has a size of 0, is animated, or too large to work on.
    """
    if isinstance(image, Tensor):
        return _channels_of(_one_image(image), channels)
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if not isinstance(image, Image.Image):
        raise UserError(
            f"an image is a PIL image, a uint8 array or a tensor in [-1, 1], not {type(image).__name__}"
        )
    try:
        _load(image)
    except BrokenImageError as error:
        raise UserError(f"the image cannot be used: {error}") from None
    pixels = torch.from_numpy(np.array(eight_bit(image, channels)))
    return pixels[None] if channels == 1 else pixels.movedim(-1, 0).contiguous()


def mask_tensor(mask: Picture, image: Picture, size: tuple[int, int]) -> Tensor:
    """Return a mask as float32 (1, H, W) in [0, 1], where 1 is generated and what lies between is blended.

    Args:
        mask: PIL image of any mode (white is 1), array or tensor of (H, W) or with one channel, bool, uint8
            (0 to 255, or 0 and 1) or float in [0, 1]; or "alpha" for what is transparent in `image`. In 8
            bits what is within 8 of black or white is that, for JPEG leaves specks.
        image: whose alpha channel "alpha" means.
        size: (H, W) of the image.

    Raises:
        UserError: it is none of these, of another size, nowhere above 0, or the image has no alpha channel.
    """
    if isinstance(mask, str):
        if mask != "alpha":
            raise UserError(f"a mask is an image, an array, a tensor or 'alpha', not {mask!r}")
        found = 1 - _from_bytes(torch.from_numpy(_alpha(image)))
    elif isinstance(mask, Image.Image):
        found = _from_bytes(torch.from_numpy(np.array(_on_black(mask))))
    elif isinstance(mask, Tensor | np.ndarray):
        found = _mask_values(torch.as_tensor(mask).detach().cpu())
    else:
        raise UserError(f"a mask is a PIL image, an array, a tensor or 'alpha', not {type(mask).__name__}")
    if tuple(found.shape) != tuple(size):
        raise UserError(
            f"the mask is {found.shape[-1]}x{found.shape[-2]} pixels and the image {size[1]}x{size[0]}; give "
            "a mask of the image's size"
        )
    if not bool((found > 0).any()):
        raise UserError("the mask is black everywhere, so nothing is to be generated; paint that white")
    return found[None]


def feathered(mask: Tensor, radius: int) -> Tensor:
    """Return a mask (1, H, W) whose edge falls off to 0 within twice `radius` pixels outside of it.

    Raises:
        UserError: a negative radius.
    """
    if radius < 0:
        raise UserError(f"feather must be at least 0 pixels, not {radius}")
    side = 2 * radius + 1
    rows = F.max_pool2d(mask, (side, 1), stride=1, padding=(radius, 0))
    wide = F.max_pool2d(rows, (1, side), stride=1, padding=(0, radius))
    padded = F.pad(wide, [radius] * 4, mode="replicate")
    soft = F.avg_pool2d(F.avg_pool2d(padded, (side, 1), stride=1), (1, side), stride=1)
    return torch.maximum(soft, mask)


@dataclass(frozen=True)
class Region:
    """A rectangle in a photo; it may reach beyond the photo, which is then mirrored there."""

    left: int
    top: int
    width: int
    height: int

    def cut(self, pixels: Tensor) -> Tensor:
        """Return these pixels (C, height, width) of a photo (C, H, W)."""
        rows = _mirrored(self.top, self.height, pixels.shape[1])
        columns = _mirrored(self.left, self.width, pixels.shape[2])
        return pixels[:, rows][:, :, columns]

    def inside(self, size: tuple[int, int]) -> tuple[slice, slice, slice, slice]:
        """Return which rows and columns of a photo of (H, W) it covers, and which of its own those are."""
        top, left = max(self.top, 0), max(self.left, 0)
        bottom, right = min(self.top + self.height, size[0]), min(self.left + self.width, size[1])
        own = slice(top - self.top, bottom - self.top), slice(left - self.left, right - self.left)
        return slice(top, bottom), slice(left, right), *own


def largest_region(size: tuple[int, int], model: tuple[int, int]) -> Region:
    """Return the largest rectangle of the model's aspect in the middle of a photo of (H, W)."""
    scale = min(size[0] / model[0], size[1] / model[1])
    height, width = _sides(scale, model)
    return Region((size[1] - width) // 2, (size[0] - height) // 2, width, height)


def region_around(mask: Tensor, padding: int | None, model: tuple[int, int]) -> Region:
    """Return what the model is to see of a photo: a rectangle of its aspect that holds the mask.

    Args:
        mask: (1, H, W).
        padding: pixels around the mask at the least; None for as much of the photo as there is.
        model: (H, W) of what the model makes.

    Returns:
        A rectangle inside the photo where one of that aspect fits, and otherwise around it.

    Raises:
        UserError: negative padding.
    """
    size = (int(mask.shape[1]), int(mask.shape[2]))
    if padding is not None and padding < 0:
        raise UserError(f"padding_mask_crop must be at least 0 pixels, not {padding}")
    spans = [_span(mask[0] > 0, axis) for axis in (1, 0)]
    if padding is None:
        scale = min(size[0] / model[0], size[1] / model[1])
    else:
        spans = [(first - padding, last + padding) for first, last in spans]
        scale = 0.0
    scale = max(scale, *((last - first) / side for (first, last), side in zip(spans, model, strict=True)))
    height, width = _sides(scale, model)
    top, left = (
        _placed(span, side, whole) for span, side, whole in zip(spans, (height, width), size, strict=True)
    )
    return Region(left, top, width, height)


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample float images (N, C, h, w) in [-1, 1] to (H, W), antialiased; of that size they stay."""
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    return F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(-1, 1)


def covered(generate: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring a bool mask (N, 1, H, W) to another size; a cell of which any part is to be generated is."""
    return F.adaptive_max_pool2d(generate.float(), tuple(size)) > 0


def filled(pixels: Tensor, unknown: Tensor) -> Tensor:
    """Replace unknown pixels by a smooth continuation of the others: averages, coarser where none is near.

    Args:
        pixels: (N, C, H, W).
        unknown: bool, (1 or N, 1, H, W).

    Returns:
        (N, C, H, W), the known pixels as they were; 0 where nothing is known.
    """
    weight = (~unknown).to(pixels.dtype).expand(len(pixels), -1, -1, -1)
    if bool(unknown.all()) or not bool(unknown.any()):
        return torch.where(unknown, torch.zeros_like(pixels), pixels)
    half = [max(1, -(-side // 2)) for side in pixels.shape[-2:]]
    share = F.adaptive_avg_pool2d(weight, half)
    mean = F.adaptive_avg_pool2d(pixels * weight, half) / share.clamp_min(1e-8)
    coarse = filled(mean, share == 0) if bool((share == 0).any()) else mean
    smooth = F.interpolate(coarse, pixels.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(unknown, smooth, pixels)


def pasted(photo: Tensor, made: Tensor, mask: Tensor, region: Region) -> Tensor:
    """Lay what a model made of a region over a photo, without a seam.

    What is made differs from the photo at the mask's edge where it was resampled or decoded. That difference
    is continued smoothly into the mask and taken off, so that both meet (as seamless cloning does).

    Args:
        photo: (C, H, W), uint8 or float in [-1, 1].
        made: of the region, (N, C, h, w) in [-1, 1], of any size.
        mask: (1, H, W) in [0, 1].
        region: where it belongs.

    Returns:
        (N, C, H, W), dtype of the photo. Where the mask is 0 it is the photo itself.
    """
    rows, columns, own_rows, own_columns = region.inside((photo.shape[1], photo.shape[2]))
    part, m = photo[:, rows, columns], mask[:, rows, columns]
    before = part if part.is_floating_point() else to_float(part)
    after = resized(made, (region.height, region.width))[:, :, own_rows, own_columns].to(before)
    known = (m == 0)[None]
    after = (after + filled(before - after, ~known)).clamp(-1, 1)
    blend = torch.lerp(before.expand_as(after), after, m)
    blend = blend if part.is_floating_point() else to_uint8(blend)
    whole = photo.expand(len(made), -1, -1, -1).clone()
    whole[:, :, rows, columns] = torch.where(known, part, blend)
    return whole


# What users hand over


def _load(picture: Image.Image) -> None:
    """Decode a picture, unless it is animated or too large to work on."""
    if getattr(picture, "is_animated", False) and picture.format != "MPO":  # what some phones call a JPEG
        raise BrokenImageError("it is animated; save one frame of it as an image of its own")
    load_bounded(picture, picture.size, beside=8)


def _one_image(image: Tensor) -> Tensor:
    one = image.detach().cpu()
    one = one[0] if one.ndim == 4 and len(one) == 1 else one
    if one.ndim != 3 or one.shape[0] not in (1, 3) or 0 in one.shape or not one.is_floating_point():
        raise UserError(
            f"an image as a tensor is float (C, H, W) or (1, C, H, W) with C 1 or 3, not {one.dtype} of "
            f"{tuple(image.shape)}"
        )
    if not bool((one.abs() <= 1).all()):  # not a number is refused too
        raise UserError("an image as a tensor has values in [-1, 1]")
    return one.float()


def _channels_of(image: Tensor, channels: int) -> Tensor:
    if image.shape[0] == channels:
        return image
    if channels == 3:
        return image.repeat(3, 1, 1)
    return (image * image.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)


def _from_array(array: np.ndarray) -> Image.Image:
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    good = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
    if array.dtype != np.uint8 or not good or 0 in array.shape:
        raise UserError(
            f"an image as an array is uint8 (H, W), (H, W, 3) or (H, W, 4), not {array.dtype} "
            f"of {array.shape}"
        )
    return Image.fromarray(array)


def _alpha(image: Picture) -> np.ndarray:
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[-1] == 4:
        return np.ascontiguousarray(image[..., 3])
    if isinstance(image, Image.Image) and image.has_transparency_data:
        return np.array(image.convert("RGBA").getchannel("A"))
    raise UserError("the image has no alpha channel to take the mask from; give a mask image")


def _on_black(mask: Image.Image) -> Image.Image:
    if mask.has_transparency_data:  # what is painted on a transparent ground
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask.convert("RGBA"))
    return eight_bit(mask, 1)


def _from_bytes(mask: Tensor) -> Tensor:
    near = torch.where(mask <= 8, 0, torch.where(mask >= 247, 255, mask))
    return near.float() / 255


def _mask_values(mask: Tensor) -> Tensor:
    values = mask.squeeze(-1) if mask.ndim == 3 and mask.shape[-1] == 1 else mask
    while values.ndim > 2 and values.shape[0] == 1:
        values = values[0]
    if values.ndim != 2:
        raise UserError(f"a mask has one channel, (H, W), not {tuple(mask.shape)}")
    if values.dtype == torch.uint8 and bool((values > 1).any()):
        return _from_bytes(values)
    values = values.float()
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise UserError("a mask has values in [0, 1], where 1 is generated")
    return values


# Where the region lies


def _sides(scale: float, model: tuple[int, int]) -> tuple[int, int]:
    # a whisker less before rounding up: 64 * (100 / 64) is 100
    height, width = (max(1, int(np.ceil(side * scale - 1e-6))) for side in model)
    return height, width


def _span(mask: Tensor, axis: int) -> tuple[int, int]:
    """First row (axis 1) or column (axis 0) in which a mask (H, W) is set, and the one after the last."""
    found = torch.nonzero(mask.any(dim=axis))[:, 0]
    return int(found[0]), int(found[-1]) + 1


def _placed(span: tuple[int, int], side: int, whole: int) -> int:
    """Where a side begins that is centred on a span and, where it fits, inside of the whole."""
    first = (span[0] + span[1] - side) // 2
    return min(max(first, 0), whole - side) if side <= whole else -((side - whole) // 2)


def _mirrored(first: int, count: int, whole: int) -> Tensor:
    """Indices of a run of pixels in a row of `whole`, which is mirrored at its ends."""
    index = torch.arange(first, first + count) % (2 * whole)
    return torch.where(index < whole, index, 2 * whole - 1 - index)
