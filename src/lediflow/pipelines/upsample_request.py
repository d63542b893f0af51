"""What one call of an upsampler is: its settings, its batches, its noise, and a word on too little memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lediflow.errors import UserError
from lediflow.sources import image_noise
from lediflow.tiles import Window, windows
from lediflow.upsampling import MAX_NOISE_LEVEL

Seeds = Sequence[tuple[int, int]]  # (seed, index) of each image


@dataclass(frozen=True)
class UpsampleRequest:
    """Settings of a call.

    Attributes:
        solver: of the flow.
        steps: of the solver.
        passes: how often the model is run, one upon the other.
        noise_level: of the start, 0 to 999.
        tile: side of a tile in what the flow works on; None for the whole at once.
        overlap: of neighbouring tiles, likewise.
        unit: sides and places of tiles are multiples of this.
    """

    solver: str
    steps: int
    passes: int
    noise_level: float
    tile: int | None = None
    overlap: int = 0
    unit: int = 1

    def windows(self, size: Sequence[int], factor: int = 1) -> list[Window]:
        """Return the tiles that cover a sample of this size; with a factor, of the pixels of such a one.

        Tiles of latents and of their pixels follow each other in the same order.
        """
        h, w = size
        tile = self.tile * factor if self.tile else max(h, w)
        return windows((h, w), tile, self.overlap * factor, self.unit * factor)


def check_noise_level(level: float) -> float:
    """Return a noise level.

    Raises:
        UserError: it is not from 0 to 999.
    """
    if not 0 <= level <= MAX_NOISE_LEVEL:
        raise UserError(f"noise_level must be from 0 to {MAX_NOISE_LEVEL}, not {level:g}")
    return level


def passes_of(scale: int, trained: int) -> int:
    """Return how often a model that was trained for one scale is run for another.

    Raises:
        UserError: it is no power of that.
    """
    passes, made = 1, trained
    while made < scale:
        passes, made = passes + 1, made * trained
    if made != scale:
        raise UserError(
            f"this model was trained to enlarge {trained} times, and scale {scale} is no power of that; take "
            f"{', '.join(str(trained**i) for i in (1, 2, 3))}, and resize the result"
        )
    return passes


def tiling_of(tile_size: int | None, overlap: int | None, factor: int, unit: int) -> tuple[int | None, int]:
    """Return tile and overlap in what the flow works on, from pixels of the result.

    Args:
        tile_size: side of a tile in pixels; None for none.
        overlap: in pixels; None for a quarter of a tile, or what comes nearest.
        factor: pixels of a side that become one latent.
        unit: what the flow's sides must be multiples of.

    Raises:
        UserError: sizes that cannot be, with one that can.
    """
    if tile_size is None:
        if overlap is not None:
            raise UserError("an overlap needs a tile_size")
        return None, 0
    step = factor * unit
    if tile_size < 2 * step or tile_size % step:
        near = max(2, round(tile_size / step)) * step
        raise UserError(
            f"tile_size {tile_size} must be a multiple of {step}, at least {2 * step}; try {near}"
        )
    if overlap is None:
        overlap = max(1, round(tile_size / 4 / step)) * step
    if overlap % step or not step <= overlap <= tile_size // 2:
        raise UserError(
            f"overlap {overlap} must be a multiple of {step}, from {step} to {tile_size // 2 // step * step}"
        )
    return tile_size // factor, overlap // factor


def seeds_of(
    count: int,
    seed: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    first_image: int,
) -> list[tuple[int, int]]:
    """Return seed and index of each image; a generator gives the seed, and goes on by one number.

    Raises:
        UserError: a list of generators, and not one for each image.
    """
    if generator is None:
        return [(seed, first_image + i) for i in range(count)]
    if isinstance(generator, torch.Generator):
        drawn = _number(generator)
        return [(drawn, first_image + i) for i in range(count)]
    if len(generator) != count:
        raise UserError(f"{len(generator)} generators for {count} images; give one, or one for each")
    return [(_number(one), 0) for one in generator]


def noise_of(shape: Sequence[int], seeds: Seeds, turn: int, device: torch.device) -> Tensor:
    """Return standard normal noise (B, *shape) that depends on seed and index of each image, and the pass."""
    stream = f"x{turn or ''}"
    drawn = [image_noise(shape, seed=seed, indices=[i], stream=stream, device=device) for seed, i in seeds]
    return torch.cat(drawn)


def batches_of(sizes: Sequence[tuple[int, ...]], batch_size: int) -> list[list[int]]:
    """Return the images of each batch: at most `batch_size` that follow each other and have one size."""
    batches: list[list[int]] = []
    for i, size in enumerate(sizes):
        if batches and len(batches[-1]) < batch_size and sizes[batches[-1][0]] == size:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@contextmanager
def memory_explained(size: tuple[int, int], tile: int | None) -> Iterator[None]:
    """Turn the lack of memory into a UserError that says how to do with less.

    Args:
        size: of the result, in pixels.
        tile: side of a tile in pixels, where there are tiles already.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        remedy = "a batch_size of 1, or tiles, as with tile_size=512"
        if tile is not None:
            remedy = f"smaller tiles: tile_size={tile} is too large, try {tile // 2}"
        raise UserError(
            f"not enough memory for images of {size[0]}x{size[1]} pixels; try {remedy}"
        ) from error


def _is_lack_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch has no class for that on a CPU
    return any(
        words in str(error) for words in ("not enough memory", "can't allocate memory", "out of memory")
    )


def _number(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))
