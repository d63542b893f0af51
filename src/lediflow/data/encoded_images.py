"""Images that a codec encodes at every visit: for sets too large to keep as latents, or cut anew.

Slower than latents that `lediflow encode` wrote (codec_latents.py), but nothing is stored, and an image may
be cut and mirrored anew each time. The latents are in the codec's own units, which are near a variance of 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lediflow.codecs import Codec, CodecSpace, latent_digest
from lediflow.data.batches import TrainingData
from lediflow.data.encode import encoded_low
from lediflow.data.images import ImageData


class EncodedImages(TrainingData):
    """The latents of images, their means, and where asked for those of the images made small.

    Attributes:
        images: what is encoded.
        space: codec and scale.
        pairs: as for `CodecLatents`.
        folder: what the images are called.
    """

    cached = False

    def __init__(self, images: ImageData, codec: Codec, pairs: tuple[int, int, str] | None = None) -> None:
        self.images, self.codec, self.pairs = images, codec, pairs
        self.flip, self.class_names, self.num_classes = images.flip, images.class_names, images.num_classes
        self.folder, self.texts = codec.name, images.texts
        still = ((0.0,) * codec.channels, (1.0,) * codec.channels)
        self.space = CodecSpace(
            codec.name, codec.hash, codec.factor, codec.channels, *still, latent_digest(codec.model)
        )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def broken(self) -> list[Any]:
        """The broken pictures found so far."""
        return self.images.broken

    def first(self, count: int) -> Tensor:
        """The latents of the first images, (n, C, h, w)."""
        return self.codec.encode(self.images.first(count)).mean.cpu()

    def first_low(self, count: int) -> Tensor:
        """The partners of `first`, (n, C, h', w')."""
        return self._low(self.images.first(count)).cpu()

    def first_labels(self, count: int) -> Tensor:
        """The classes of `first`, int64 (n,)."""
        return self.images.first_labels(count)

    def in_order(self, batch_size: int, *, mirror: bool = False, workers: int = 0) -> Iterator[Tensor]:
        """Go through the latents of the readable images once, (B, C, h, w) at a time."""
        for images in self.images.in_order(batch_size, mirror=mirror, workers=workers):
            yield self.codec.encode(images).mean

    def show(self, items: Tensor) -> Tensor:
        """Decode latents (n, C, h, w)."""
        return self.codec.decode(items.float())

    def serve(self, *, batch_size, seed, start, stop, workers, rank, world_size):
        """Yield the batches of the images, encoded in this process; see `batches`."""
        served = self.images.serve(
            batch_size=batch_size, seed=seed, start=start, stop=stop, workers=workers, rank=rank,
            world_size=world_size,
        )  # fmt: skip
        for batch in served:
            pixels = batch["image"]
            encoded = {**batch, "image": self.codec.encode(pixels).mean.cpu()}
            yield encoded if self.pairs is None else {**encoded, "low": self._low(pixels).cpu()}

    def _low(self, pixels: Tensor) -> Tensor:
        assert self.pairs is not None, "the caller looked"
        low_size, _, way = self.pairs
        return encoded_low(pixels, self.codec, low_size, way)
