"""The noise behind every source: w ~ N(0, 1) for latents and images, and x = mu + sigma * noise for P_L.

Plain flow matching starts at the noise itself; LeDiFlow starts at `AuxiliaryModel.decode(z).at(noise)`; with
`optimal_coupling` the noise of a batch is dealt out so that the paths together are shortest.

Image i of a request is a function of (seed, i) alone: its noise comes from a generator of its own, so
neither batch size nor device count can change it. The same holds for image i of a training batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lediflow.devices import to_device
from lediflow.flow import logit_normal, stratified_t

Path = Literal["linear", "slerp"]

# images of a batch whose noise a GPU draws at once: a launch for each would take longer than a step
BLOCK = 32


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
    indices = list(indices)
    noise = torch.empty((len(indices), *shape))
    _fill(noise, [derive_seed(seed, stream, index) for index in indices])
    return to_device(noise, device).to(dtype)


def _fill(noise: Tensor, seeds: Sequence[int]) -> None:
    """Fill each row of noise (N, ...) with standard normal numbers from a generator of its own seed."""
    generator = torch.Generator(noise.device)
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(seed))


def optimal_coupling(x: Tensor, y: Tensor, groups: Tensor | None = None) -> Tensor:
    """Reorder the source samples of a batch so that sum ||y_i - x_i||^2 is least: minibatch OT.

    OT-CFM (arXiv 2302.00482, 2304.14772). The pairs (x_i, y_i) follow the plan that is optimal within the
    batch; x alone keeps its distribution. Where the network is told a class, x must keep its distribution
    within each class too, for sampling draws it independently of the class: so each class deals out its own
    noise (C2OT, arXiv 2503.10636).

    Args:
        x: source samples, (B, ...).
        y: targets, (B, ...).
        groups: the class of each pair, integers (B,); None for one.

    Returns:
        x in another order, (B, ...).
    """
    from scipy.optimize import linear_sum_assignment

    # on the CPU, for the assignment is made there, and not every device has float64
    flat_x, flat_y = x.flatten(1).cpu().double(), y.flatten(1).cpu().double()
    order = torch.arange(len(x))
    labels = torch.zeros(len(x), dtype=torch.long) if groups is None else groups.cpu()
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        cost = torch.cdist(flat_y[rows], flat_x[rows]).square()
        order[rows] = rows[torch.from_numpy(linear_sum_assignment(cost.numpy())[1])]
    return x[order.to(x.device)]


def between(a: Tensor, b: Tensor, share: float, path: Path) -> Tensor:
    """Return the point at a share in [0, 1] of the way from a to b, of any one shape.

    Args:
        a: the point at 0.
        b: the point at 1.
        share: of the way.
        path: "linear", or "slerp": along the arc, sin((1 - s) u) a + sin(s u) b over sin u for the angle u
            between both (Shoemake 1985). Where they point the same way or opposite ways, that is linear.
    """
    flat_a, flat_b = a.flatten().cpu().double(), b.flatten().cpu().double()
    cosine = torch.dot(flat_a, flat_b) / (flat_a.norm() * flat_b.norm()).clamp_min(1e-12)
    angle = cosine.clamp(-1, 1).acos()
    if path == "linear" or float(angle.sin()) < 1e-4:
        return torch.lerp(a, b, share)
    weights = ((1 - share) * angle).sin() / angle.sin(), (share * angle).sin() / angle.sin()
    return float(weights[0]) * a + float(weights[1]) * b


class BatchNoise:
    """All that is drawn for one training batch, or for the part of it that one process works on.

    What image p of the whole batch gets depends on (seed, p) and the kind of device alone. However the batch
    is cut over processes and micro-batches, every image meets the same noise.

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
        first, last = self.positions.start, self.positions.stop
        block = 1 if self.device.type == "cpu" else BLOCK
        begin = first // block * block
        starts = range(begin, last, block)
        noise = torch.empty((len(starts), block, *shape), device=self.device)
        _fill(noise, [derive_seed(self.seed, stream, start) for start in starts])
        return noise.flatten(0, 1)[first - begin : last - begin]

    def uniform(self, stream: str) -> Tensor:
        """Draw one number on [0, 1) for each image: (len(positions),)."""
        return self._part(torch.rand(self.batch_size, generator=self._shared(stream)))

    def times(self, law: Literal["uniform", "logit-normal"] = "uniform") -> Tensor:
        """Draw t for each image: (len(positions),), stratified over the whole batch (`flow.stratified_t`)."""
        t = stratified_t(self.batch_size, self._shared("t"))
        return self._part(t if law == "uniform" else logit_normal(t))

    def _shared(self, stream: str) -> torch.Generator:
        # on the CPU, so that processes agree on the whole batch whatever their devices
        return torch.Generator("cpu").manual_seed(derive_seed(self.seed, stream))

    def _part(self, whole: Tensor) -> Tensor:
        return whole[self.positions.start : self.positions.stop].to(self.device)
