"""The noise behind every source: w ~ N(0, 1) for latents and images, and x = mu + sigma * noise for P_L.

Plain flow matching starts at the noise itself; LeDiFlow starts at `AuxiliaryModel.decode(z).at(noise)`.

Image i of a request is a function of (seed, i) alone: its noise comes from a generator of its own, so
neither batch size nor device count can change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


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
