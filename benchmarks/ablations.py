"""What each switch of the recipe is worth: train variants of one run that differ in one setting.

    python benchmarks/ablations.py recipe                          # the flow's switches, on the digits
    python benchmarks/ablations.py average-velocity
    python benchmarks/ablations.py recipe --config faces-32 --data faces64-train.parquet \
        --validation faces64-validation.parquet --only "as it is" "beta 4"

A variant trains the stages that its setting touches and shares the others with the first one. Quality is the
Frechet distance in the features of a small classifier (lower is better): of images whose z is sampled, and,
where the flow starts at P_L, of images whose z is encoded from training images, which leaves the sampler out.
Variants that are there already are only measured again.
"""

import argparse
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from lediflow import UserError
from lediflow.conditions import Conditions
from lediflow.devices import check_device
from lediflow.evaluation.real import open_real_side
from lediflow.evaluation.request import Settings
from lediflow.evaluation.tables import markdown_table
from lediflow.files import default_cache
from lediflow.metrics.features import CLASSIFIER
from lediflow.metrics.scores import distances
from lediflow.networks.velocity import IntervalFeatures
from lediflow.pictures import to_float
from lediflow.pipelines.load import load_pipeline
from lediflow.training.config import load_config
from lediflow.training.run import train

ALL = ("auxiliary", "flow", "sampler")
MEAN = ("meanflow", "sampler-meanflow", "baseline-meanflow")


def everywhere(setting: str) -> list[str]:
    """A setting of the three stages that learn an average velocity."""
    return [f"training.{stage.replace('-', '_')}.{setting}" for stage in MEAN]


# name: (settings, stages that they touch)
GROUPS: dict[str, dict[str, tuple[list[str], tuple[str, ...]]]] = {
    "recipe": {
        "as it is": ([], (*ALL, "baseline")),
        "no importance weighting": (["training.flow.importance_weighting=false"], ("flow",)),
        "beta 0.25": (["training.auxiliary.beta=0.25"], ALL),
        "beta 4": (["training.auxiliary.beta=4"], ALL),
        "z through the mapping network": (["flow.z_conditioning=mapping"], ("flow",)),
        "sampler on raw z": (["training.auxiliary.standardize_z=false"], ALL),
        "logit-normal t, flow": (["training.flow.times=logit-normal"], ("flow",)),
        "uniform t, sampler": (["training.sampler.times=uniform"], ("sampler",)),
        "independent coupling, sampler": (["training.sampler.coupling=independent"], ("sampler",)),
        "OT coupling, baseline": (["training.baseline.coupling=optimal-transport"], ("baseline",)),
        "logit-normal t, baseline": (["training.baseline.times=logit-normal"], ("baseline",)),
        "classes": (["data.classes=CLASSES"], (*ALL, "baseline")),
    },
    "average-velocity": {
        "as it is": ([], (*ALL, "baseline", *MEAN)),
        "high frequencies": ([], MEAN),
        "independent coupling, sampler": (
            ["training.sampler_meanflow.coupling=independent"],
            ("sampler-meanflow",),
        ),
        "squared error": (everywhere("error_power=0"), MEAN),
        "high frequencies, squared error": (everywhere("error_power=0"), MEAN),
    },
}
HIGH_FREQUENCIES = ("high frequencies", "high frequencies, squared error")


@contextmanager
def frequencies(highest: float):
    """Let r - t be embedded with frequencies up to `highest`, as t is."""
    before = IntervalFeatures.__init__.__defaults__
    IntervalFeatures.__init__.__defaults__ = (before[0], highest)
    try:
        yield
    finally:
        IntervalFeatures.__init__.__defaults__ = before


def train_variant(name: str, settings: list[str], stages: tuple[str, ...], common: list[str], a) -> Path:
    """Train the stages in a run folder of their own, beside copies of those they share with the first."""
    run, first = (a.output / n.replace(" ", "-").replace(",", "") for n in (name, "as it is"))
    needed = set(ALL) | {"baseline"} | (set(MEAN) if a.group == "average-velocity" else set())
    for stage in needed - set(stages):
        if not (run / stage).exists():
            shutil.copytree(first / stage, run / stage)
    with frequencies(3.0 if name in HIGH_FREQUENCIES else 0.6):
        train(load_config(a.config, common + settings), run, stages=stages, device=a.device)
    return run


class Judge:
    """The quality of images beside those of one dataset, by the headline metric of one feature network.

    A distance is the mean of those of as many images as there are held-out ones, so that the floor compares.
    """

    def __init__(self, config, *, classifier_steps=400, features=CLASSIFIER, device):
        data = config.data
        settings = Settings(
            data=data.train,
            validation=data.validation,
            features=(features,),
            reference_images=10**9,
            num_images=10**9,
            bootstrap=0,
            classifier_steps=classifier_steps,
        )
        shape = (data.channels, data.image_size, data.image_size)
        side = open_real_side(shape, settings, default_cache(), check_device(device))
        if side.held_out is None:
            raise UserError("the ablations need held-out images: give --validation")
        self.train, self.count = side.reference, len(side.held_out)
        self._network = side.networks[0]
        self.metric, self._real = self._network.headline, side.features[self._network.name]
        self.floor = side.floor[f"{self._network.name}/{self.metric}"]["value"]

    def distance(self, images: torch.Tensor) -> float:
        """Distance of images (N, C, H, W) in [-1, 1], N a multiple of `count`."""
        features = torch.cat([self._network(batch) for batch in images.split(512)])
        groups = features.split(self.count)
        found = [distances(self._network, g, self._real, replicates=0, seed=0)[self.metric] for g in groups]
        return sum(estimate.value for estimate in found) / len(groups)


@torch.no_grad()
def encoded(
    pipeline, judge: Judge, steps: int, solver: str, count: int, batch_size: int = 64
) -> torch.Tensor:
    """Images whose z is encoded from training images, evenly chosen."""
    chosen = torch.linspace(0, len(judge.train) - 1, count).long()
    all_labels, images = judge.train.labels(), []
    for part in chosen.split(batch_size):
        y = to_float(judge.train.pixels(part)).to(pipeline.device)
        z = pipeline.encode(y).mean
        x = pipeline.prior(z).at(pipeline.noise(y.shape[1:], part.tolist(), 0, "x"))
        labels = Conditions(label=all_labels[part].to(y.device) if pipeline.flow.classes() else None)
        images.append(pipeline.carry(x, z, labels, steps=steps, solver=solver).end.clamp(-1, 1).cpu())
    return torch.cat(images)


def measure(run: Path, judge: Judge, group: str, dtype: torch.dtype | None) -> list[str]:
    """One row of the table: a distance per way of sampling."""
    options = {"batch_size": 64, "output_type": "pt", "dtype": dtype}
    count = 3 * judge.count
    ours, baseline = (load_pipeline(folder) for folder in (run, run / "baseline"))
    for pipeline in (ours, baseline):
        pipeline.set_progress_bar_config(disable=True)
    if group == "recipe":
        results = [
            *(ours(count, steps=n, solver="midpoint", latent_steps=2, **options).images for n in (1, 4)),
            *(encoded(ours, judge, n, "midpoint", count) for n in (1, 4)),
            *(baseline(count, steps=n, solver="midpoint", **options).images for n in (2, 8)),
        ]
    else:
        mean_baseline = load_pipeline(run / "baseline-meanflow")
        mean_baseline.set_progress_bar_config(disable=True)
        results = [
            ours(count, **options).images,
            ours(count, latent_steps=2, latent_solver="midpoint", **options).images,
            encoded(ours, judge, 1, "mean", count),
            encoded(ours, judge, 2, "mean", count),
            *(mean_baseline(count, steps=n, **options).images for n in (1, 2)),
        ]
    return [f"{judge.distance(images):.2f}" for images in results]


HEADERS = {
    "recipe": [
        "LeDiFlow, 1 step", "4 steps", "z encoded, 1 step", "4 steps", "baseline, 2 steps", "8 steps"
    ],
    "average-velocity": [
        "one evaluation of each", "sampler 2 midpoint steps", "z encoded, 1 evaluation", "2 evaluations",
        "baseline, 1 evaluation", "2 evaluations",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--config", default="digits", help="preset or YAML file")
    parser.add_argument("--data", help="images, with classes; default: the config's")
    parser.add_argument("--validation", help="held-out images; default: the data's own split")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="for all variants")
    parser.add_argument("--only", nargs="+", help="names of variants; the first one is always trained")
    parser.add_argument("--classifier-steps", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of sampling")
    parser.add_argument("--device")
    a = parser.parse_args()
    common = [*a.settings, "training.preview_every=100000", "training.tracker=none"]
    common += [f"data.{k}={v!r}" for k, v in (("train", a.data), ("validation", a.validation)) if v]
    a.output = a.output / f"{Path(a.config).stem}-{a.group}"
    try:
        config = load_config(a.config, common)
        judge = Judge(config, classifier_steps=a.classifier_steps, device=a.device)
        rows = []
        for name, (settings, stages) in GROUPS[a.group].items():
            if a.only and name not in a.only and name != "as it is":
                continue
            settled = [s.replace("CLASSES", str(judge.train.num_classes)) for s in settings]
            run = train_variant(name, settled, stages, common, a)
            rows.append([name, *measure(run, judge, a.group, None if a.dtype == "fp32" else torch.bfloat16)])
            print(rows[-1], file=sys.stderr, flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(markdown_table(["variant", *HEADERS[a.group]], rows))
    print(f"\nfloor {judge.floor:.2f}")


if __name__ == "__main__":
    main()
