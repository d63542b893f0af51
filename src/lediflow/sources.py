"""The noise behind every source: w ~ N(0, 1) for latents and images, and x = mu + sigma * noise for P_L.

Plain flow matching starts at the noise itself; LeDiFlow starts at `AuxiliaryModel.decode(z).at(noise)`.

Image i of a request is a function of (seed, i) alone: its noise comes from a generator of its own, so
neither batch size nor device count can change it. The same holds for image i of a training batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lediflow.flow import stratified_t


def derive_seed(seed: int, *names: int | str) -> int:
    """Return a 63-bit seed that depends on `seed` and on every name, for an independent stream of noise."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def image_noise(
    shape: Sequence[int], *, seed: int, indices: Iterable[int], stream: str, device=None, dtype=torch.float32
) -> Tensor:
    """Draw standard normal noise for the images `indices` of the request `seed`.

    Args:
        shape: of one image, (C, H, W).
        seed: of the request.
        indices: which images, each with a generator of its own.
        stream: what the noise is for ("w" for latents, "x" for pixels); streams are independent.
        device: where to put the noise; it is drawn on the CPU, so that all devices agree.
        dtype: of the result; drawn in float32.

    Returns:
        (len(indices), C, H, W).
    """
    generator = torch.Generator("cpu")
    rows = [
        torch.randn(tuple(shape), generator=generator.manual_seed(derive_seed(seed, stream, index)))
        for index in indices
    ]
    return torch.stack(rows).to(device=device, dtype=dtype)


class BatchNoise:
    """All that is drawn for one training batch, or for the part of it that one process works on.

    What image p of the whole batch gets depends on (seed, p) alone. However the batch is cut over processes
    and micro-batches, every image meets the same noise.

    Args:
        seed: of the step.
        batch_size: of the whole batch.
        positions: which images of the whole batch this part holds.
        device: where the noise is drawn.
    """

    def __init__(self, seed: int, *, batch_size: int, positions: range, device: torch.device):
        self.seed, self.batch_size, self.positions, self.device = seed, batch_size, positions, device

    def normal(self, shape: Sequence[int], stream: str) -> Tensor:
        """Draw standard normal noise (len(positions), *shape) in fp32; streams are independent."""
        noise = torch.empty((len(self.positions), *shape), device=self.device)
        generator = torch.Generator(self.device)
        for row, position in zip(noise, self.positions, strict=True):
            row.normal_(generator=generator.manual_seed(derive_seed(self.seed, stream, position)))
        return noise

    def uniform(self, stream: str) -> Tensor:
        """Draw one number on [0, 1) for each image: (len(positions),)."""
        return self._part(torch.rand(self.batch_size, generator=self._shared(stream)))

    def times(self) -> Tensor:
        """Draw t for each image: (len(positions),), stratified over the whole batch (`flow.stratified_t`)."""
        return self._part(stratified_t(self.batch_size, self._shared("t")))

    def _shared(self, stream: str) -> torch.Generator:
        # on the CPU, so that processes agree on the whole batch whatever their devices
        return torch.Generator("cpu").manual_seed(derive_seed(self.seed, stream))

    def _part(self, whole: Tensor) -> Tensor:
        return whole[self.positions.start : self.positions.stop].to(self.device)
