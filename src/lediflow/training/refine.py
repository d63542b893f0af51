"""Stages that refine a trained flow to one evaluation, and the table of all stages.

meanflow            the flow's average velocity from P_L       MeanFlow's identity (flow.py)
sampler-meanflow    the sampler's, from N(0, 1)                the same
baseline-meanflow   the baseline's, from N(0, 1)               the same
distill             the flow's own end points, from P_L        regression, without a derivative
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lediflow import flow, ode
from lediflow.data.batches import TrainingData, batches
from lediflow.files import explained, written_whole
from lediflow.networks.attention import forward_mode
from lediflow.sources import derive_seed, image_noise
from lediflow.training.config import Config
from lediflow.training.progress import Progress
from lediflow.training.stage_config import StageName
from lediflow.training.stages import (
    AuxiliaryStage,
    BaselineStage,
    FlowStage,
    Latents,
    Pairs,
    SamplerStage,
    Stage,
    VelocityStage,
)

PAIRS_PER_FILE = 256


class _Refined(VelocityStage):
    """A stage that starts from the weights of another one's network, whose u is v at first."""

    solver = "mean"

    def start_from(self, teacher: nn.Module) -> None:
        """Take over the teacher's weights; what the average velocity adds stays at zero."""
        self.network.load_state_dict(teacher.state_dict(), strict=False)


class _MeanFlow(_Refined):
    """Learn the average velocity by its identity, beside the velocity itself.

    Attributes:
        correction: (point, v, t, r, z, labels) -> (r - t) du/dt, compiled where the model is.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        compiled = self.config.training.compile == "model"
        self.correction = torch.compile(self._correction) if compiled else self._correction

    def loss(self, model, batch, noise):
        """Regression on v + (r - t) du/dt, eq. 10 of arXiv 2505.13447 with this path's direction."""
        pairs, settings = self.pairs(batch, noise), self.settings
        labels = self.training_labels(batch, noise)
        t, r, moving = flow.draw_intervals(
            noise.times(),
            noise.uniform("r"),
            noise.positions,
            equal_share=settings.equal_share,
            end_share=settings.end_share,
        )
        point, v = flow.phi(pairs.x, pairs.y, t), flow.velocity(pairs.x, pairs.y)
        # before the derivative: autocast keeps the weights it casts, and those of no_grad have no gradient
        u = model(point, t, pairs.z, labels, r)
        target = v.clone()
        size = v.new_zeros(())
        if moving:
            parts = (None if part is None else part[moving] for part in (pairs.z, labels))
            with forward_mode():
                correction = self.correction(point[moving], v[moving], t[moving], r[moving], *parts)
            target[moving] += correction
            size = correction.square().mean().sqrt() / v[moving].square().mean().sqrt()
        errors = (u.float() - target).square()
        if pairs.sigma is not None:
            errors = errors / pairs.sigma.clamp_min(flow.SIGMA_MIN)
        errors = errors.flatten(1).mean(1)
        return flow.adaptive_loss(errors, settings.error_power), {
            "error": errors.detach().mean(),
            "correction": size,
        }

    def _correction(
        self, point: Tensor, v: Tensor, t: Tensor, r: Tensor, z: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        return flow.average_velocity_correction(
            lambda point, t: self.network.forward(point, t, z, labels, r), point, v, t, r
        )


class MeanFlowStage(_MeanFlow, FlowStage):
    """One evaluation from P_L to y."""

    name = "meanflow"


class SamplerMeanFlowStage(_MeanFlow, SamplerStage):
    """One evaluation from w to z."""

    name = "sampler-meanflow"


class BaselineMeanFlowStage(_MeanFlow, BaselineStage):
    """One evaluation from N(0, 1) to y."""

    name = "baseline-meanflow"


class DistillStage(_Refined, FlowStage):
    """Learn where the trained flow ends, from pairs made once and kept."""

    name: StageName = "distill"
    teacher: Any

    def start_from(self, teacher: nn.Module) -> None:
        """Take over the teacher's weights, and keep it for the pairs."""
        super().start_from(teacher)
        self.teacher = teacher.to(self.device)

    def make_pairs(self, folder: Path, identity: str, *, rank: int = 0, world_size: int = 1) -> None:
        """Let the teacher carry x ~ P_L to its end, for as many pairs as the config says.

        What is in `folder` from an earlier start with the same `identity` stays. z and the end are kept; x is
        drawn again from its seed.

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
        with Progress("distill pairs", 0, count, silent=rank > 0 or not missing) as progress:
            for i in missing:
                ends = self._carry(self._batch(i), i)
                with explained(self.files[i]), written_whole(self.files[i]) as unfinished:
                    save_file(ends, unfinished, metadata={"identity": identity})
                progress.update(i + 1, f"{PAIRS_PER_FILE} each")

    def load_pairs(self) -> None:
        """Read the pairs of all files; half precision keeps them small."""
        self.kept = {}
        files = [safe_open(file, "pt") for file in self.files]
        for name in files[0].keys():  # noqa: SIM118  not a dict
            self.kept[name] = torch.cat([file.get_tensor(name) for file in files])

    def _batch(self, i: int) -> dict[str, Any]:
        seed = derive_seed(self.config.training.seed, "distill", "pairs")
        return next(batches(self.data, batch_size=PAIRS_PER_FILE, seed=seed, start=i, stop=i + 1))

    @torch.no_grad()
    def _carry(self, batch: dict[str, Any], i: int) -> dict[str, Tensor]:
        batch = {k: v.to(self.device) for k, v in batch.items() if isinstance(v, Tensor)}
        count = len(batch["index"])
        numbers = range(i * PAIRS_PER_FILE, i * PAIRS_PER_FILE + count)
        z = self.latents.posterior(batch).at(self._noise("z", self.auxiliary.latent_shape, numbers))
        labels = batch["label"] if self.config.data.classes else None
        x = self.auxiliary.decode(z).at(self._noise("x", self.config.sample_shape, numbers))
        end = ode.integrate(
            lambda t, state: self.teacher(state, t, z, labels),
            x,
            steps=self.settings.teacher_steps,
            solver="midpoint",
        ).end
        kept = {"z": z.float(), "end": end.half(), "label": batch["label"]}
        return {name: value.contiguous().cpu() for name, value in kept.items()}

    def _noise(self, stream: str, shape: tuple[int, ...], numbers: Any) -> Tensor:
        seed = derive_seed(self.config.training.seed, "distill")
        return image_noise(shape, seed=seed, indices=numbers, stream=stream, device=self.device)

    def loss(self, model, batch, noise):
        """Mean squared error of x + u(x, 0, 1) against the teacher's end; the images are not looked at."""
        count = len(self.kept["z"])
        numbers = (noise.uniform("pair") * count).long().clamp_max(count - 1).tolist()
        z, end, label = (self.kept[name][numbers].to(self.device) for name in ("z", "end", "label"))
        with torch.no_grad():
            x = self.auxiliary.decode(z).at(self._noise("x", self.config.sample_shape, numbers))
        pairs = Pairs(x, end.float(), z)
        t = torch.zeros(len(numbers), device=self.device)
        labels = self.training_labels({"label": label}, noise)
        u = model(pairs.x, t, pairs.z, labels, torch.ones_like(t))
        return flow.matching_loss(u, pairs.x, pairs.y), {}


def _is_there(file: Path, identity: str) -> bool:
    if not file.exists():
        return False
    with safe_open(file, "pt") as opened:
        return (opened.metadata() or {}).get("identity") == identity


STAGE_CLASSES: dict[StageName, type[Stage]] = {
    stage.name: stage
    for stage in (
        AuxiliaryStage,
        FlowStage,
        SamplerStage,
        BaselineStage,
        MeanFlowStage,
        SamplerMeanFlowStage,
        BaselineMeanFlowStage,
        DistillStage,
    )
}


def build_stage(
    name: StageName,
    config: Config,
    data: TrainingData,
    device: torch.device,
    latents: Latents | None = None,
    teacher: nn.Module | None = None,
) -> Any:
    """Return the stage `name`.

    Args:
        name: of the stage.
        config: of the run.
        data: what it trains on.
        device: where it trains.
        latents: for the stages that need the auxiliary model (`config.NEEDS_LATENTS`).
        teacher: the trained network that a refining stage starts from; None starts with fresh weights.
    """
    kind: Any = STAGE_CLASSES[name]
    stage = kind(config, data, device) if latents is None else kind(config, data, device, latents)
    if teacher is not None:
        stage.start_from(teacher)
    return stage
