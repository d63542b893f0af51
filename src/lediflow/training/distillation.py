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
from torch.nn import functional as F

from lediflow import flow, ode
from lediflow.conditions import Conditions
from lediflow.data.batches import MapData, batches
from lediflow.files import clear_files, explained, written_whole
from lediflow.networks.auxiliary import AuxiliaryModel
from lediflow.progress import Progress
from lediflow.sources import BatchNoise, derive_seed, image_noise
from lediflow.training.objectives import Objective
from lediflow.training.teacher import Teacher

PAIRS_PER_FILE = 256
END, BETWEEN = "end", "between"  # in a file of pairs; the rest are conditions


class Distillation(Objective):
    """Learn x + u(x, 0, 1), where the trained flow that the stage starts from carries x.

    With `points` "trajectory" half of a batch learns the ways between the points of the teacher's steps
    instead (CMT, arXiv 2509.24526).
    """

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
            "points": self.settings.points,
            "seed": self.config.training.seed,
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
        self.ends, self.between = pairs.pop(END), pairs.pop(BETWEEN, None)
        self.conditions = Conditions(**pairs)

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
        self.ends, self.between = kept.pop(END), kept.pop(BETWEEN, None)
        self.conditions = Conditions(**kept)

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
        points = ode.integrate(
            self.teacher.field(conditions),
            self._x(conditions, numbers),
            steps=self.settings.teacher_steps,
            solver="mean" if self.teacher.network.average_velocity else "midpoint",
            trajectory=True,
        ).trajectory.half()
        kept = {END: points[-1], **conditions}
        if self.settings.points == "trajectory":
            kept[BETWEEN] = points[1:-1].transpose(0, 1)
        return {name: value.contiguous().cpu() for name, value in kept.items()}

    @property
    def _seed(self) -> int:
        return derive_seed(self.config.training.seed, self.name)

    @torch.no_grad()
    def _x(self, conditions: Conditions, numbers: Sequence[int]) -> Tensor:
        """The source samples of the pairs `numbers`, the same whenever and wherever they are drawn."""
        noise = image_noise(
            self.coupling.shape,
            seed=self._seed,
            indices=numbers,
            stream=self.coupling.stream,
            device=self.context.device,
        )
        return self.coupling.source(conditions, noise)[0]

    def loss(self, model, batch, noise):
        """Mean squared error of x + u(x, 0, 1) against the teacher's end; the images are not looked at."""
        count = len(self.ends)
        numbers = (noise.uniform("pair") * count).long().clamp_max(count - 1).tolist()
        conditions = self.conditions.rows(numbers).to(self.context.device)
        x, end = self._x(conditions, numbers), self.ends[numbers].to(self.context.device, torch.float32)
        t = torch.zeros(len(numbers), device=self.context.device)
        r = torch.ones_like(t)
        if self.between is not None:
            x, end, t, r = self._part_of_the_way(x, self.between[numbers].to(x), end, noise)
        span = flow.expand_t(r - t, x)
        u = model(x, t, self.given(conditions, noise), r)
        loss = (u.float() - (end - x) / span).square().mean()
        if not self.settings.perceptual:
            return loss, {}
        ended = r == 1
        far = perceptual_distance(
            self.context.network("auxiliary"), (x + span * u.float())[ended], end[ended]
        )
        return loss + self.settings.perceptual * far, {"squared": loss.detach(), "perceptual": far.detach()}

    def _part_of_the_way(
        self, x: Tensor, between: Tensor, end: Tensor, noise: BatchNoise
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Two points of each trajectory, x and its end for every second image, and their times."""
        points = torch.cat((x[:, None], between, end[:, None]), dim=1)
        last = points.shape[1] - 1
        first = (noise.uniform("first") * last).long().clamp_max(last - 1)
        second = first + 1 + (noise.uniform("second") * (last - first)).long()
        whole = torch.tensor([i % 2 == 0 for i in noise.positions], device=x.device)
        first, second = first.masked_fill(whole, 0), second.clamp_max(last).masked_fill(whole, last)
        rows = torch.arange(len(x), device=x.device)
        return points[rows, first], points[rows, second], first / last, second / last


def perceptual_distance(encoder: AuxiliaryModel, a: Tensor, b: Tensor) -> Tensor:
    """Mean over levels and places of 2 - 2 cos of the encoder's tokens of two batches of images, a scalar.

    As LPIPS (arXiv 1801.03924) compares, in the features of theta_E, which has seen these images only.
    """
    with torch.no_grad():
        goal = encoder.levels(b)
    pairs = zip(encoder.levels(a), goal, strict=True)
    return torch.stack(
        [2 - 2 * F.cosine_similarity(p.float(), q.float(), dim=-1).mean() for p, q in pairs]
    ).mean()


def _is_there(file: Path, identity: str) -> bool:
    try:
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get("identity") == identity
    except (OSError, SafetensorError):  # none, or damaged: made again
        return False
