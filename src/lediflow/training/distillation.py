"""Distillation: learn where a trained flow ends, from pairs that it makes once and that are kept.

The flow is followed in several steps: of its velocity (midpoint), or of its average velocity (mean).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lediflow import ode
from lediflow.conditions import Conditions
from lediflow.data.batches import MapData, batches
from lediflow.files import clear_files, explained, written_whole
from lediflow.progress import Progress
from lediflow.sources import BatchNoise, derive_seed, image_noise
from lediflow.training.objectives import Objective
from lediflow.training.teacher import Teacher

PAIRS_PER_FILE = 256
SPECTRUM_OF = 1024  # ends, whose mean spectrum weighs the errors
END = "end"  # in a file of pairs; the rest are conditions


class Distillation(Objective):
    """Learn x + u(x, 0, 1), where the trained flow that the stage starts from carries x."""

    average_velocity = True
    solver = "mean"

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.teacher = Teacher(self.spec, self.context, always=True)

    def prepare(self, folder, identity, accelerator):
        """Make the pairs, or those that an earlier start did not."""
        facts = {
            **identity,
            "pairs": self.settings.pairs,
            "steps": self.settings.teacher_steps,
            "seed": self.config.training.seed,
            "temperature": self.config.temperature,
            **self.config.strengths(self.spec),
        }
        rank, world_size = accelerator.process_index, accelerator.num_processes
        with accelerator.autocast():
            self.make_pairs(
                folder / "pairs", json.dumps(facts, sort_keys=True), rank=rank, world_size=world_size
            )
        accelerator.wait_for_everyone()
        self.load_pairs()

    def rehearse(self):
        """Make one file's pairs and keep them in memory."""
        _, batch = next(self._batches([0]))
        pairs = self._carry(batch, 0)
        self._use(pairs.pop(END), Conditions(**pairs))

    def make_pairs(self, folder: Path, identity: str, *, rank: int = 0, world_size: int = 1) -> None:
        """Let the teacher carry x to its end, for as many pairs as the config says.

        What is in `folder` from an earlier start with the same `identity` stays. Conditions and the end are
        kept; x is drawn again from its seed.

        Args:
            folder: for the files of PAIRS_PER_FILE pairs.
            identity: of what made them; files of another one are replaced.
            rank: of this process, which makes every world_size-th file.
            world_size: number of processes.
        """
        count = -(-self.settings.pairs // PAIRS_PER_FILE)
        self.files = [folder / f"{i:05d}.safetensors" for i in range(count)]
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        missing = [i for i in range(rank, count, world_size) if not _is_there(self.files[i], identity)]
        with Progress(f"{self.name} pairs", 0, count, silent=rank > 0 or not missing) as progress:
            for i, batch in self._batches(missing):
                pairs = self._carry(batch, i)
                clear_files(folder, of=self.files[i])  # each has one maker
                with explained(self.files[i]), written_whole(self.files[i]) as unfinished:
                    save_file(pairs, unfinished, metadata={"identity": identity})
                progress.update(i + 1, f"{PAIRS_PER_FILE} each")

    def load_pairs(self) -> None:
        """Read the pairs of all files; half precision keeps them small."""
        files = [safe_open(file, "pt") for file in self.files]
        kept = {name: torch.cat([file.get_tensor(name) for file in files]) for name in files[0].keys()}  # noqa: SIM118
        self._use(kept.pop(END), Conditions(**kept))

    def _use(self, ends: Tensor, conditions: Conditions) -> None:
        self.ends, self.conditions = ends, conditions
        some = ends[:SPECTRUM_OF].to(self.context.device, torch.float32)
        self.weights = frequency_weights(some, self.settings.detail)

    def _batches(self, wanted: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the batches of some files, by number, ascending."""
        data, seed = self.context.data, derive_seed(self.config.training.seed, self.name, "pairs")
        if not wanted:
            return
        if isinstance(data, MapData):
            for i in wanted:
                yield i, next(batches(data, batch_size=PAIRS_PER_FILE, seed=seed, start=i, stop=i + 1))
            return
        # a stream reads all that comes before, so once for all files
        stop = wanted[-1] + 1
        for i, batch in enumerate(batches(data, batch_size=PAIRS_PER_FILE, seed=seed, stop=stop)):
            if i in wanted:
                yield i, batch

    @torch.no_grad()
    def _carry(self, batch: dict[str, Any], i: int) -> dict[str, Tensor]:
        batch = {k: v.to(self.context.device) for k, v in batch.items() if isinstance(v, Tensor)}
        count = len(batch["index"])
        numbers = range(i * PAIRS_PER_FILE, i * PAIRS_PER_FILE + count)
        noise = BatchNoise(self._seed, batch_size=numbers.stop, positions=numbers, device=self.context.device)
        _, conditions = self.coupling.targets(batch, noise)
        conditions = self.teacher.strengths(conditions, noise)
        end = ode.integrate(
            self.teacher.field(conditions),
            self._x(conditions, numbers),
            steps=self.settings.teacher_steps,
            solver="mean" if self.teacher.network.average_velocity else "midpoint",
        ).end
        kept = {END: end.half(), **conditions}
        return {name: value.contiguous().cpu() for name, value in kept.items()}

    @property
    def _seed(self) -> int:
        return derive_seed(self.config.training.seed, self.name)

    @torch.no_grad()
    def _x(self, conditions: Conditions, numbers: Sequence[int]) -> Tensor:
        """Return x = mu + temperature * sigma * noise of the pairs `numbers`, always the same.

        The temperature is the run's own, which images are made at: the less noise the student has to take
        away in its one evaluation, the less grain is left.
        """
        noise = image_noise(
            self.coupling.shape,
            seed=self._seed,
            indices=numbers,
            stream=self.coupling.stream,
            device=self.context.device,
        )
        return self.coupling.source(conditions, self.config.temperature * noise)[0]

    def loss(self, model, batch, noise):
        """Mean squared error of x + u(x, 0, 1) against the teacher's end, weighted by frequency.

        The images are not looked at.
        """
        count = len(self.ends)
        numbers = (noise.uniform("pair") * count).long().clamp_max(count - 1).tolist()
        conditions = self.conditions.rows(numbers).to(self.context.device)
        x, end = self._x(conditions, numbers), self.ends[numbers].to(self.context.device, torch.float32)
        t = torch.zeros(len(numbers), device=self.context.device)
        u = model(x, t, self.given(conditions, noise), torch.ones_like(t))
        return (self.weights * power(x + u - end)).mean(), {}


def power(images: Tensor) -> Tensor:
    """Return the power of images (..., H, W) at each frequency, whose mean is their mean square."""
    return torch.view_as_real(torch.fft.fft2(images, norm="ortho")).square().sum(-1)


def frequency_weights(ends: Tensor, exponent: float) -> Tensor:
    """Return what an error at each frequency counts, (H, W): (power of `ends` there)^-exponent, of mean 1.

    At 0 all count 1, so that the loss is the squared error. Images have little power in their fine detail,
    and so has its error; a larger exponent makes up for it.

    Args:
        ends: images, (N, C, H, W).
        exponent: 0 to 1.
    """
    spectrum = power(ends).mean((0, 1))
    weights = spectrum.clamp_min(1e-6 * spectrum.mean()) ** -exponent
    return weights / weights.mean()


def _is_there(file: Path, identity: str) -> bool:
    try:
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get("identity") == identity
    except (OSError, SafetensorError):  # none, or damaged: made again
        return False
