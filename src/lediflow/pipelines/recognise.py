"""What was given to be enlarged: pictures, pixels, codec latents, or latents as Flux packs them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lediflow.codecs import CodecSpace
from lediflow.data.decode import eight_bit
from lediflow.errors import UserError
from lediflow.pictures import to_float

InputType = Literal["auto", "pixels", "latent"]


@dataclass(frozen=True)
class Given:
    """What is to be enlarged.

    Attributes:
        images: one after the other, (1, C, h, w) each: pixels in [-1, 1], or latents in the codec's units.
        latent: which of the two.
    """

    images: list[Tensor]
    latent: bool


def recognise(
    image: Any,
    channels: int,
    space: CodecSpace | None,
    *,
    input_type: InputType = "auto",
    height: int | None = None,
    width: int | None = None,
) -> Given:
    """Return what was given as tensors, one for each image.

    Args:
        image: a PIL image or a list of them; pixels (B, channels, h, w), float in [-1, 1] or uint8; latents
            (B, C, h, w) of a base pipeline; or latents packed as Flux does, (B, h/2 * w/2, 4 C).
        channels: of pixels, 1 or 3.
        space: of the model's latents; None for a model of pixels.
        input_type: what a tensor is, where its channels do not tell.
        height: of the image that packed latents stand for, in pixels; None for a square one.
        width: likewise.

    Raises:
        UserError: it is none of these, or of another kind than the model's; it names what it is.
    """
    if input_type not in ("auto", "pixels", "latent"):
        raise UserError(f"input_type must be 'auto', 'pixels' or 'latent', not {input_type!r}")
    if input_type == "latent" and space is None:
        raise UserError("this model enlarges pixels, not latents; give it pictures")
    if isinstance(image, Image.Image):
        image = [image]
    if isinstance(image, Sequence) and image and all(isinstance(one, Image.Image) for one in image):
        if input_type == "latent":
            raise UserError("pictures were given, and input_type says latents")
        return Given([_pixels(one, channels) for one in image], latent=False)
    if isinstance(image, Sequence) and image and all(isinstance(one, Tensor) for one in image):
        parts = [
            recognise(one, channels, space, input_type=input_type, height=height, width=width)
            for one in image
        ]
        if len({part.latent for part in parts}) > 1:
            raise UserError("some of the tensors are pixels and others latents; give them one kind at a time")
        return Given([one for part in parts for one in part.images], parts[0].latent)
    if not isinstance(image, Tensor):
        raise UserError(f"cannot enlarge a {type(image).__name__}; give PIL images, or a tensor (B, C, H, W)")
    if image.ndim == 3 and input_type != "pixels":
        image = unpacked(image, space, height, width)
        return Given(list(_numbers(image).split(1)), latent=True)
    if image.ndim != 4 or not image.numel():
        raise UserError(f"a tensor must be (B, C, H, W), not {tuple(image.shape)}")
    if _is_latent(image, channels, space, input_type):
        return Given(list(_numbers(image).split(1)), latent=True)
    return Given(list(_in_range(image).split(1)), latent=False)


def unpacked(packed: Tensor, space: CodecSpace | None, height: int | None, width: int | None) -> Tensor:
    """Return latents (B, C, h, w) of what Flux packs to (B, h/2 * w/2, 4 C), squares of four to a token.

    Raises:
        UserError: they are of another kind, or of another size than said, or not square and no size is said.
    """
    shape = tuple(packed.shape)
    if space is None or packed.shape[-1] != 4 * space.channels:
        wanted = "pixels" if space is None else f"latents of {space.channels} channels, not {shape[-1] / 4:g}"
        raise UserError(
            f"a tensor {shape} was given, as Flux packs latents; this model enlarges {wanted}. Pixels are "
            "given as (B, C, H, W)"
        )
    tokens, side = packed.shape[1], 2 * space.factor
    if height is None and width is None:
        h = w = math.isqrt(tokens)
    else:
        # one side follows from the other
        h = height // side if height is not None else tokens // max(1, (width or 0) // side)
        w = width // side if width is not None else tokens // max(1, h)
    if h * w != tokens:
        said = "is not square" if height is None and width is None else f"is not {height}x{width} pixels"
        raise UserError(f"packed latents of {tokens} tokens: the image {said}; give its height and width")
    grid = packed.view(len(packed), h, w, space.channels, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(packed), space.channels, 2 * h, 2 * w)


def _is_latent(x: Tensor, channels: int, space: CodecSpace | None, input_type: InputType) -> bool:
    """Decide by the channels whether x is latents, and refuse it where it is neither."""
    pixels = x.shape[1] == channels and input_type != "latent"
    latents = space is not None and x.shape[1] == space.channels and input_type != "pixels"
    if pixels and latents:
        raise UserError(
            f"pixels and latents both have {channels} channels here; say which with input_type='pixels' or "
            "'latent'"
        )
    if pixels or latents:
        return latents
    wanted = f"pixels with {channels} channels" if input_type != "latent" else ""
    if space is not None and input_type != "pixels":
        wanted += f"{' or ' if wanted else ''}latents with {space.channels} (codec {space.codec!r})"
    raise UserError(
        f"this model enlarges {wanted}; what was given has {x.shape[1]} channels, so it is of another kind"
    )


def _pixels(picture: Image.Image, channels: int) -> Tensor:
    array = np.asarray(eight_bit(picture, 1 if channels == 1 else 3))
    pixels = torch.from_numpy(array.copy())
    return to_float(pixels[None, None] if pixels.ndim == 2 else pixels.movedim(-1, 0)[None])


def _in_range(x: Tensor) -> Tensor:
    if x.dtype == torch.uint8:
        return to_float(x)
    x = _numbers(x)
    if float(x.abs().max()) > 1.001:
        raise UserError(
            f"pixels must be in [-1, 1], or uint8; these go from {float(x.min()):.3g} to {float(x.max()):.3g}"
        )
    return x.clamp(-1, 1)


def _numbers(x: Tensor) -> Tensor:
    x = x.float()
    if not bool(x.isfinite().all()):
        raise UserError(
            "what is to be enlarged holds values that are no number (a base in fp16 may overflow)"
        )
    return x
