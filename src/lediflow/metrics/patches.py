"""Random squares of images, whose distances judge texture and sharpness where whole images look alike."""

from __future__ import annotations

import torch
from torch import Tensor

from lediflow.errors import UserError
from lediflow.sources import derive_seed


def random_squares(images: Tensor, size: int, count: int, *, seed: int = 0, first: int = 0) -> Tensor:
    """Cut squares out of images, at places that depend on (seed, image) alone.

    Args:
        images: (N, C, H, W).
        size: side of the squares, pixels.
        count: of each image.
        seed: of the places.
        first: number of the first image, for sets that come in parts.

    Returns:
        (N * count, C, size, size), those of an image in a row.

    Raises:
        UserError: the images are smaller than the squares.
    """
    h, w = images.shape[2:]
    if min(h, w) < size:
        raise UserError(f"squares of {size} px do not fit in images of {h}x{w}")
    squares = []
    generator = torch.Generator()
    for i, image in enumerate(images):
        generator.manual_seed(derive_seed(seed, "squares", first + i))
        tops = torch.randint(h - size + 1, (count,), generator=generator).tolist()
        lefts = torch.randint(w - size + 1, (count,), generator=generator).tolist()
        squares += [image[:, t : t + size, x : x + size] for t, x in zip(tops, lefts, strict=True)]
    return torch.stack(squares)
