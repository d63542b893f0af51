"""How well an upsampler's stages make held-out images large: fidelity, distances, time by part, the path.

Works on a run folder, whatever its starts: each stage is asked by its own coupling and objective, so flows,
regressions and diffusion are measured alike. Images are whole, whatever crops were trained on.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lediflow import ode
from lediflow.conditions import Conditions
from lediflow.data.batches import MapData
from lediflow.errors import UserError
from lediflow.fields import conditional
from lediflow.metrics.features import FeatureNetwork
from lediflow.metrics.pairs import psnr, ssim
from lediflow.metrics.patches import random_squares
from lediflow.metrics.scores import RealFeatures, distances
from lediflow.pictures import to_float, to_pil, to_uint8
from lediflow.sources import BatchNoise, derive_seed
from lediflow.training.builders import build_stage
from lediflow.training.config import load_run_config
from lediflow.training.couplings import Context
from lediflow.training.inputs import open_data
from lediflow.training.objectives import Objective
from lediflow.training.run_pipelines import load_network
from lediflow.upsampling import shrunk

PATCHES = 4  # of each image


@dataclass(frozen=True)
class Pair:
    """A held-out image in both sizes.

    Attributes:
        y: what the stages learn to make, (B, C, H, W).
        conditions: what they are told.
        high: y as images, (B, 1 or 3, H', W') in [-1, 1].
        low: the same images made small.
        first: number of the first image.
    """

    y: Tensor
    conditions: Conditions
    high: Tensor
    low: Tensor
    first: int


class HeldOut:
    """Held-out images in pairs, the same for every stage of a run.

    Args:
        run: run folder.
        dataset: as for `data.train` of the run: images, or latents in pairs.
        count: how many images.
        seed: of the noise.
        batch_size: images at a time.
        device: where the networks are.

    Raises:
        UserError: the run has no upsampler, or the data do not fit it.
    """

    def __init__(
        self, run: Path, dataset: str, *, count: int, seed: int = 0, batch_size: int = 16, device: Any = "cpu"
    ):
        self.run, self.seed, self.batch_size = run, seed, batch_size
        self.device = torch.device(device)
        self.trained_as = load_run_config(run)
        upsampler = self.trained_as.section("upsampler").model_copy(update={"crop": None, "sigma_min": 0.0})
        data = self.trained_as.data.model_copy(update={"train": dataset, "flip": False, "crop": "center"})
        self.config = self.trained_as.model_copy(update={"upsampler": upsampler, "data": data})
        opened = open_data(self.config)
        if not isinstance(opened, MapData):
            raise UserError("held-out images must have an index: neither data.streaming nor data.encode")
        self.data, self.count = opened, min(count, len(opened))
        self._real: dict[tuple[str, int], tuple[RealFeatures, RealFeatures]] = {}
        self._context = Context(self.config, self.data, self.device, self._trained)

    def stage(self, name: str) -> Objective:
        """Return a trained stage, its network with the averaged weights."""
        stage = build_stage(name, self._context)
        stage.network = self._trained(name).to(self.device)
        stage.solver = "mean" if stage.average_velocity else "euler"
        return stage

    def pairs(self, stage: Objective) -> Iterator[Pair]:
        """Yield the images in both sizes, as the stage is told of them."""
        scale, how = self.config.section("upsampler").scale, self.config.section("upsampler").shrink
        for first in range(0, self.count, self.batch_size):
            rows = range(first, min(first + self.batch_size, self.count))
            batch: dict[str, Tensor] = self.data.batch([(i, 0) for i in rows])
            if batch["image"].dtype == torch.uint8:
                batch["image"] = to_float(batch["image"])
            batch = {name: x.to(self.device) for name, x in batch.items()}
            y, conditions = stage.coupling.targets(batch, self._noise(first, len(rows)))
            high = self.data.show(y)
            low = shrunk(high, scale, how) if "low" not in batch else self.data.show(batch["low"])
            yield Pair(y, conditions, high, low, first)

    def start(self, stage: Objective, pair: Pair) -> Tensor:
        """Return x of a pair; of every stage from the same noise."""
        noise = self._noise(pair.first, len(pair.y)).normal(stage.coupling.shape, stage.coupling.stream)
        return stage.coupling.source(pair.conditions, noise)[0]

    def real(
        self, stage: Objective, features: FeatureNetwork, patch: int
    ) -> tuple[RealFeatures, RealFeatures]:
        """Return features of the large images, and of squares of them; computed once."""
        key = features.digest, patch
        if key not in self._real:
            whole, squares = [], []
            for pair in self.pairs(stage):
                whole.append(features(pair.high))
                squares.append(features(self.squares(pair.high, pair, patch)))
            self._real[key] = RealFeatures.of(torch.cat(whole)), RealFeatures.of(torch.cat(squares))
        return self._real[key]

    def squares(self, images: Tensor, pair: Pair, patch: int) -> Tensor:
        """Cut squares out of the images of a pair, at the same places of every version of them."""
        return random_squares(images, patch, PATCHES, seed=self.seed, first=pair.first)

    def _noise(self, first: int, count: int) -> BatchNoise:
        seed = derive_seed(self.seed, "held out", first)
        return BatchNoise(seed, batch_size=count, positions=range(count), device=self.device)

    def _trained(self, name: str) -> Any:
        return load_network(self.run, name, self.trained_as)


# One way of making images large


def of_stage(held: HeldOut, stage: Objective, steps: int, solver: str | None = None) -> Callable[[Pair], Any]:
    """Return pair -> (samples, evaluations, seconds by part) of a trained stage.

    Args:
        held: the images.
        stage: from `HeldOut.stage`.
        steps: of its solver, or of DDIM; a regression takes one whatever they are.
        solver: None for one evaluation a step: "mean" for an average velocity, else "euler".
    """
    if solver is not None:
        stage.solver = solver

    @torch.no_grad()
    def make(pair: Pair) -> tuple[Tensor, float, dict[str, float]]:
        seconds: dict[str, float] = {}
        with timed(seconds, "start", held.device):
            x = held.start(stage, pair)
        with counted(stage.network) as calls, timed(seconds, "network", held.device):
            end = stage.carry(x, pair.conditions, steps)
        evaluations = calls[0] / len(x) if stage.solver == "dopri5" else calls[0]
        with timed(seconds, "codec", held.device):
            made = held.data.show(end)
        return made, evaluations, seconds

    return make


def of_filter(name: str) -> Callable[[Pair], Any]:
    """Return pair -> (images, 0, seconds) of a filter: "nearest", "bicubic" or "lanczos"."""

    def make(pair: Pair) -> tuple[Tensor, float, dict[str, float]]:
        seconds: dict[str, float] = {}
        size = pair.high.shape[-2:]
        with timed(seconds, "network", pair.low.device):
            if name == "lanczos":
                large = [p.resize(size[::-1], Image.Resampling.LANCZOS) for p in to_pil(pair.low)]
                arrays = [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in large]
                pixels = torch.stack([a.view(*size, -1).movedim(-1, 0) for a in arrays])
                made = to_float(pixels).to(pair.low.device)
            elif name == "nearest":
                made = functional.interpolate(pair.low, size, mode="nearest-exact")
            else:
                made = functional.interpolate(pair.low, size, mode="bicubic", align_corners=False)
        return made, 0, seconds

    return make


@torch.no_grad()
def measure(
    held: HeldOut,
    stage: Objective,
    make: Callable[[Pair], Any],
    features: FeatureNetwork | None = None,
    *,
    patch: int = 32,
) -> tuple[dict[str, float], Tensor]:
    """Measure one way of making images large.

    Args:
        held: the images.
        stage: whose coupling tells of them.
        make: from `of_stage` or `of_filter`.
        features: in which distances are taken; None for no distances.
        patch: side of the squares of which patch distances are taken, pixels.

    Returns:
        {"psnr", "ssim", "evaluations", "ms" of an image and "ms start", "ms network", "ms codec" of it, and
        for features the names of the distances and "patch " + those}; and the first images made.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    evaluations, shown = 0.0, None
    for pair in held.pairs(stage):
        made, nfe, taken = make(pair)
        made, evaluations = made.clamp(-1, 1), evaluations + nfe * len(pair.y)
        for part, spent in taken.items():
            seconds[part] += spent
        found["psnr"].append(psnr(made, pair.high))
        found["ssim"].append(ssim(made, pair.high))
        shown = to_uint8(made).cpu() if shown is None else shown
        if features is not None:
            found["whole"].append(features(made))
            found["squares"].append(features(held.squares(made, pair, patch)))
    assert shown is not None, "there is at least one image"
    row = {name: torch.cat(found[name]).mean().item() for name in ("psnr", "ssim")}
    row["evaluations"] = evaluations / held.count
    row["ms"] = 1000 * sum(seconds.values()) / held.count
    row |= {f"ms {part}": 1000 * spent / held.count for part, spent in seconds.items()}
    if features is not None:
        whole, squares = held.real(stage, features, patch)
        for which, made, real in (("", found["whole"], whole), ("patch ", found["squares"], squares)):
            scores = distances(features, torch.cat(made), real, replicates=0, seed=0)
            wanted = (features.frechet_name, features.mmd_name)
            row |= {which + name: scores[name].value for name in wanted}
    return row, shown


@torch.no_grad()
def along_the_path(held: HeldOut, stage: Objective, *, steps: int = 10, images: int = 6) -> list[Tensor]:
    """Return what the state looks like at every second step of a flow, rows of `images` each (figure 8)."""
    pair = next(held.pairs(stage))
    conditions, x = pair.conditions.rows(slice(images)), held.start(stage, pair)[:images]
    field = conditional(stage.network, conditions)
    path = ode.integrate(field, x, steps=steps, solver=stage.solver, trajectory=True).trajectory
    assert path is not None, "it was asked for"
    return [held.data.show(state).clamp(-1, 1) for state in path[::2]]


@contextmanager
def counted(network: torch.nn.Module) -> Iterator[list[float]]:
    """Count the calls of a network; the list's one number grows."""
    calls = [0.0]

    def count(*_: Any) -> None:
        calls[0] += 1

    hook = network.register_forward_hook(count)
    try:
        yield calls
    finally:
        hook.remove()


@contextmanager
def timed(seconds: dict[str, float], part: str, device: torch.device) -> Iterator[None]:
    """Add what a part takes: of the processor on a CPU, which others may share, of the clock elsewhere."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = clock()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[part] = seconds.get(part, 0.0) + clock() - began
