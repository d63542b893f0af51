"""A codec between pixels and normalised latents that sees no more than a tile at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lediflow.codecs import Codec, CodecSpace
from lediflow.pipelines.upsample_request import UpsampleRequest
from lediflow.tiles import blended


@dataclass(frozen=True)
class TiledCodec:
    """An autoencoder, in the tiles of a request.

    diffusers' own tiling keeps all tiles until the last is made; here each goes where it belongs at once.

    Attributes:
        vae: the autoencoder; None where it is not needed.
        space: of its latents.
        request: whose tiles they are.
        nfe: counts its runs, as "encoder" and "codec".
    """

    vae: Any
    space: CodecSpace
    request: UpsampleRequest
    nfe: Counter[Any]

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, C, H, W) in [-1, 1], sides multiples of the factor, to the latents' mode."""
        factor = self.space.factor
        size = [side // factor for side in pixels.shape[2:]]
        tiles, codec = self.request.windows(pixels.shape[2:], factor), Codec(self.vae)
        self.nfe["encoder"] += len(tiles)
        latents = (codec.encode(tile.of(pixels)).mean.to(pixels.device) for tile in tiles)
        return self.space.normalize(blended(latents, self.request.windows(size), size))

    def decode(self, made: Tensor) -> Tensor:
        """Decode normalised latents (B, c, h, w) to pixels in [-1, 1]."""
        factor = self.space.factor
        size = [side * factor for side in made.shape[2:]]
        tiles, codec = self.request.windows(made.shape[2:]), Codec(self.vae)
        self.nfe["codec"] += len(tiles)
        latents = self.space.denormalize(made)
        pixels = (codec.decode(tile.of(latents)) for tile in tiles)
        return blended(pixels, self.request.windows(size, factor), size).clamp_(-1, 1)
