"""Ideas for one evaluation that the library does not have, each beside a recipe, on the digits or on faces.

    python benchmarks/ideas.py
    python benchmarks/ideas.py --seeds 0 --only "noise on z, flow" muon
    python benchmarks/ideas.py faces-32 --data faces-train.parquet --validation faces-validation.parquet \
        --features mobilenet-v1-imagenet

Quality (lower is better) is that of images of one evaluation of each network, at the temperatures 1 and 0.8:
the Frechet distance in the features of a small classifier, of three times as many digits as are held out, or
the MMD in those of --features, of as many images as are held out. An idea trains the stages that it touches,
and shares the others with the recipe of the same seed. Those whose name begins with "distilled" end with
`meanflow-distill`. Beside muon stands also after how many steps it is where AdamW ends, for the flow and for
plain flow matching. What is trained already is only measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ablations import Judge
from drifting import drifting_loss, masked_autoencoder
from torch import Tensor

from lediflow import UserError, flow, ode
from lediflow.evaluation.tables import markdown_table
from lediflow.metrics.features import CLASSIFIER
from lediflow.pipelines.load import load_pipeline
from lediflow.training.builders import OBJECTIVES
from lediflow.training.config import load_config
from lediflow.training.couplings import COUPLINGS, LearnedPrior
from lediflow.training.distillation import Distillation
from lediflow.training.objectives import Elbo
from lediflow.training.run import train

COMMON = (
    "training.precision=fp32",
    "training.compile=model",
    "training.preview_every=100000",
    "training.tracker=none",
)
DISTILL = "training.meanflow_distill"
RECIPES = {
    "digits": [
        "training.auxiliary.steps=300", "training.flow.steps=400", "training.weak_flow.steps=50",
        "training.sampler.steps=400", "training.sampler_meanflow.steps=150", "training.meanflow.steps=150",
        "training.meanflow.autoguidance=[1,2]", "training.baseline.steps=600",
        f"{DISTILL}.steps=200", f"{DISTILL}.pairs=4096", f"{DISTILL}.teacher_steps=4",
        f"{DISTILL}.learning_rate=6e-4", f"{DISTILL}.warmup_steps=20", f"{DISTILL}.schedule=cosine",
    ],
    "faces-32": [
        "training.auxiliary.steps=300", "training.flow.steps=400", "training.weak_flow.steps=50",
        "training.sampler.steps=400", "training.sampler_meanflow.steps=150", "training.meanflow.steps=150",
        "training.baseline.steps=400", f"{DISTILL}.steps=150", f"{DISTILL}.pairs=4096",
    ],
}  # fmt: skip
FLOWS = ("flow", "weak-flow", "meanflow")
ALL = ("auxiliary", "clusters", *FLOWS, "sampler", "sampler-meanflow")
TEMPERATURES = (1.0, 0.8)


# Noise on z: flow and decoder see z as far off as the sampler's one evaluation may be


Z_NOISE = 0.1  # of the deviation of z over the training set


class NoisyPrior(LearnedPrior):
    """z ~ q(z|y) and a little more."""

    def draw_z(self, batch, noise):
        """Return a z for each image of the batch, (B, c, h, w)."""
        z = super().draw_z(batch, noise)
        return z + Z_NOISE * self.auxiliary.z_std * noise.normal(self.auxiliary.z_shape, "more-z")


class NoisyElbo(Elbo):
    """The decoder reads z ~ q(z|y) and a little more; the KL term is that of q(z|y)."""

    def loss(self, model, batch, noise):
        """As `Elbo`, without its metrics."""
        y, _ = self.coupling.targets(batch, noise)
        posterior = model.encode(y)
        z = posterior.at(noise.normal(self.network.z_shape, "z"))
        scale = (posterior.mean.var(0).mean() + posterior.std.square().mean()).sqrt().detach()
        prior = model.decode(z + Z_NOISE * scale * noise.normal(self.network.z_shape, "more-z"))
        return prior.nll(y).mean() + self.settings.beta * posterior.kl().sum() / y.numel(), {}


# Distillation: more points of the way, other losses at its end


class AlongTheWay(Distillation):
    """From each point of the teacher's way to its end (CMT, arXiv 2509.24526), not from its start alone."""

    def _carry(self, batch, i):
        points: list[Tensor] = []
        integrate = ode.integrate

        def watched(*arguments, **options):
            solution = integrate(*arguments, **options, trajectory=True)
            points.extend(solution.trajectory)
            return solution

        with swapped(vars(ode), "integrate", watched):
            kept = super()._carry(batch, i)
        return {**kept, "way": torch.stack(points[:-1], 1).half().contiguous()}

    def load_pairs(self):
        """Read the pairs, and the points of their ways apart."""
        super().load_pairs()
        self.way = self.conditions["way"]  # (N, steps, C, H, W)
        self.conditions = self.conditions.only([name for name in self.conditions if name != "way"])

    def loss(self, model, batch, noise):
        """Mean squared error of point + (1 - t) u(point, t, 1) against the end."""
        count, steps = self.way.shape[:2]
        numbers = (noise.uniform("pair") * count).long().clamp_max(count - 1)
        step = (noise.uniform("step") * steps).long().clamp_max(steps - 1)
        conditions = self.conditions.rows(numbers)
        point, end, t = self.way[numbers, step].float(), self.ends[numbers].float(), step / steps
        u = model(point, t, self.given(conditions, noise), torch.ones_like(t))
        return (point + flow.expand_t(1 - t, u) * u - end).square().mean(), {}


class Ends(Distillation):
    """A further loss of the images that the student makes, beside the squared error of their ends."""

    weight = 1.0

    def loss(self, model, batch, noise):
        """Squared error against the teacher's end, and `beside`."""
        seen: list[Tensor] = []

        def watched(x: Tensor, *told: Any) -> Tensor:
            u = model(x, *told)
            seen.append(x + u)
            return u

        plain, _ = super().loss(watched, batch, noise)
        numbers = (noise.uniform("pair") * len(self.ends)).long().clamp_max(len(self.ends) - 1)
        beside = self.beside(seen[0], self.ends[numbers].float(), batch["image"])
        return plain + self.weight * beside, {"plain": plain.detach(), "beside": beside.detach()}

    def beside(self, made: Tensor, end: Tensor, images: Tensor) -> Tensor:
        """A further loss of the images that were made."""
        raise NotImplementedError


class PerceptualEnds(Ends):
    """The squared error in the last tokens of the run's own encoder too."""

    weight = 0.1

    def beside(self, made, end, images):
        """Mean squared error of tokens that have a mean square of 1."""
        encoder = self.context.network("auxiliary")
        theirs, ours = (encoder.posterior_norm(encoder._encoded(y)) for y in (end, made))
        return (ours - theirs).square().mean()


class DriftingEnds(Ends):
    """Drifting (arXiv 2602.04770) in the features of a masked autoencoder of the data, beside the ends."""

    weight = 0.1

    def prepare(self, folder, identity, accelerator):
        """Train the features first."""
        super().prepare(folder, identity, accelerator)
        data = self.context.data
        images = torch.cat(list(data.in_order(256)))
        self.features = masked_autoencoder(images, patch=images.shape[-1] // 8)

    def beside(self, made, end, images):
        """Squared distance of features to where they drift."""
        ours, theirs = self.features(made), self.features(images)
        return sum(drifting_loss(a, b) for a, b in zip(ours, theirs, strict=True)) / len(ours)


# Muon


class Muon(torch.optim.AdamW):
    """AdamW, but matrices move along their orthogonalised momentum (torch.optim.Muon, in fp32)."""

    @torch.no_grad()
    def step(self, closure=None):
        """One step; updates have the size of AdamW's (0.2 root of the longer side), so its rates hold."""
        matrices = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or p.ndim != 2 or min(p.shape) < 16:
                    continue
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                ahead = p.grad.lerp(momentum, 0.95)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonal(ahead), alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)
                matrices.append((p, p.grad))
                p.grad = None
        super().step(closure)
        for p, gradient in matrices:
            p.grad = gradient


def orthogonal(g: Tensor) -> Tensor:
    """Bring the singular values of g near 1, by five steps of Newton-Schulz."""
    x = (g.T if g.shape[0] > g.shape[1] else g) / g.norm().clamp_min(1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


@dataclass(frozen=True)
class Idea:
    """What an idea changes.

    Attributes:
        stages: that it trains; the rest is the recipe's.
        settings: of the config, beside the recipe's.
        swaps: (table, name, what stands there instead).
    """

    stages: tuple[str, ...]
    settings: tuple[str, ...] = ()
    swaps: tuple[tuple[Any, str, Any], ...] = field(default=())


def distilled(objective: type[Distillation], *settings: str) -> Idea:
    """A way to distil the average velocity."""
    return Idea(("meanflow-distill",), settings, ((OBJECTIVES, "distillation", objective),))


AS_IT_IS = "as it is"
IDEAS = {
    AS_IT_IS: Idea((*ALL, "baseline")),
    "distilled": distilled(Distillation),
    "distilled at temperature 1": distilled(Distillation, "temperature=1"),
    "distilled, detail": distilled(Distillation, "training.meanflow_distill.detail=0.5"),
    "distilled along the way": distilled(AlongTheWay),
    "distilled, perceptual": distilled(PerceptualEnds),
    "distilled, drifting": distilled(DriftingEnds),
    "muon": Idea((*ALL, "baseline"), (), ((vars(torch.optim), "AdamW", Muon),)),
    "flow told the clusters": Idea(FLOWS, ("clusters.networks=[sampler,flow]",)),
    "noise on z, flow": Idea(FLOWS, (), ((COUPLINGS, "learned-prior", NoisyPrior),)),
    "noise on z, flow and decoder": Idea(
        ALL, (), ((COUPLINGS, "learned-prior", NoisyPrior), (OBJECTIVES, "elbo", NoisyElbo))
    ),
    "beta 2": Idea(ALL, ("training.auxiliary.beta=2",)),
    "beta 0.5": Idea(ALL, ("training.auxiliary.beta=0.5",)),
    "beta 0.25": Idea(ALL, ("training.auxiliary.beta=0.25",)),
}


@contextmanager
def swapped(table: Any, name: str, value: Any) -> Iterator[None]:
    """Let something else stand in a table for a while."""
    before = table[name]
    table[name] = value
    try:
        yield
    finally:
        table[name] = before


def train_idea(name: str, preset: str, common: list[str], folder: Path, *, baseline: bool) -> Path:
    """Train the stages of an idea, beside copies of those that it shares with the recipe."""
    idea, run = IDEAS[name], folder / name.replace(",", "").replace(" ", "-")
    stages = [stage for stage in idea.stages if baseline or stage != "baseline"]
    for stage in set(ALL) - set(stages):
        if not (run / stage).exists():
            shutil.copytree(folder / AS_IT_IS.replace(" ", "-") / stage, run / stage)
    with ExitStack() as stack:
        for swap in idea.swaps:
            stack.enter_context(swapped(*swap))
        train(load_config(preset, [*common, *idea.settings]), run, stages=stages, device="cpu")
    return run


def measure(run: Path, judge: Judge, count: int) -> list[float]:
    """Distance at each temperature, of images of one evaluation of each network."""
    pipeline = load_pipeline(run)
    pipeline.set_progress_bar_config(disable=True)
    made = (pipeline(count, temperature=t, batch_size=64, output_type="pt").images for t in TEMPERATURES)
    return [judge.distance(images) for images in made]


def losses(run: Path, stage: str) -> Mapping[int, float]:
    """The logged loss after each number of steps."""
    lines = (run / stage / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return {line["step"]: line["loss"] for line in found if line.get("loss") is not None}


def steps_to(run: Path, other: Path, stage: str) -> str:
    """After how many steps the loss of `run` is, and stays, where that of `other` ends."""
    ours, theirs = losses(run, stage), losses(other, stage)
    goal = theirs[max(theirs)]
    above = [step for step, loss in ours.items() if loss > goal]
    later = [step for step in ours if step > max(above, default=0)]
    return f"{stage}: {min(later) if later else 'never'} of {max(theirs)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", nargs="?", choices=list(RECIPES), default="digits")
    parser.add_argument("--data", help="images to train on; default: the preset's")
    parser.add_argument("--validation", help="held-out images; default: the data's own split")
    parser.add_argument("--features", default=CLASSIFIER, help="feature network, as for lediflow evaluate")
    parser.add_argument("--only", nargs="+", choices=list(IDEAS), help="ideas; the recipe is always trained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of training")
    parser.add_argument("--output", type=Path, default=Path("runs/ideas"))
    a = parser.parse_args()
    common = [*RECIPES[a.preset], *COMMON]
    common += [f"data.{k}={v!r}" for k, v in (("train", a.data), ("validation", a.validation)) if v]
    chosen = [name for name in IDEAS if name == AS_IT_IS or not a.only or name in a.only]
    try:
        judge = Judge(load_config(a.preset, common), features=a.features, device="cpu")
        rows = compare(chosen, judge, common, a)
    except UserError as error:
        sys.exit(f"error: {error}")
    headers = [f"seed {seed}, temperature {t:g}" for seed in a.seeds for t in TEMPERATURES]
    print(markdown_table(["idea", *headers], [[name, *found] for name, found in rows.items()]))
    print(f"\nheld-out images {judge.floor:.3g}")


def compare(
    chosen: list[str], judge: Judge, common: list[str], a: argparse.Namespace
) -> dict[str, list[str]]:
    """Train and measure each idea with each seed; return its distances, by name."""
    rows: dict[str, list[str]] = {name: [] for name in chosen}
    count = judge.count * (3 if a.features == CLASSIFIER else 1)
    for seed in a.seeds:
        folder = a.output / a.preset / str(seed)
        for name in chosen:
            settings = [*common, f"training.seed={seed}"]
            run = train_idea(name, a.preset, settings, folder, baseline="muon" in chosen)
            rows[name] += [f"{value:.2f}" for value in measure(run, judge, count)]
            print(seed, name, rows[name], file=sys.stderr, flush=True)
            if name == "muon":
                base = folder / AS_IT_IS.replace(" ", "-")
                print(seed, [steps_to(run, base, s) for s in ("flow", "baseline")], file=sys.stderr)
    return rows


if __name__ == "__main__":
    main()
