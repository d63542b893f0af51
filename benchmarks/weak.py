"""Which worse network guides best: trained shortly, an early average, or a smaller one; and how short.

    python benchmarks/weak.py runs/faces --stage flow --data faces-train.parquet \\
        --validation faces-validation.parquet --features mobilenet-v1-imagenet
    python benchmarks/weak.py runs/fm --stage baseline --data ... --kinds short early --shares 0.03 0.1

For autoguidance (arXiv 2406.02507). RUN has a trained `flow` (with its latent sampler) or `baseline`. Each
worse network sees a share of that stage's steps:

    short     a training of its own, whose learning rate ends at 0, as weak-flow and weak-baseline have it
    early     at the stage's own learning rate to its last step: what the average of its weights is that early
    small     short, with half the width

and guides the same network, at each strength. Lower is better: the headline metric of the features (MMD, or
the Frechet distance in a classifier's) of as many images as are held out. What is trained already is only
measured.
"""

import argparse
import shutil
import sys
from pathlib import Path

from ablations import Judge

from lediflow import UserError
from lediflow.evaluation.tables import markdown_table
from lediflow.metrics.features import CLASSIFIER
from lediflow.pipelines.load import load_pipeline
from lediflow.training.config import load_config
from lediflow.training.run import train
from lediflow.training.run_pipelines import load_network

QUIET = ["training.preview_every=100000", "training.tracker=none"]
KINDS = ("short", "early", "small")


def settings_of(kind: str, config, stage: str, steps: int) -> list[str]:
    """What the worse network's training changes in the run's config."""
    weak, strong = f"training.weak_{stage}", getattr(config.training, stage)
    found = [f"{weak}.steps={steps}", f"{weak}.batch_size={strong.batch_size}"]
    if kind == "early":
        return [*found, f"{weak}.schedule=constant", f"{weak}.learning_rate={strong.learning_rate}"]
    if kind == "small":
        d_head = config.flow.d_head
        halves = [max(d_head, width // 2 // d_head * d_head) for width in config.flow.widths]
        found.append(f"flow.widths={halves}")
    return found


def worse_network(kind: str, share: float, a):
    """Train a worse network, or find it trained; return it and its number of steps."""
    config = load_config(a.run / "config.yaml", QUIET)
    steps = max(10, round(share * getattr(config.training, a.stage).steps))
    run = a.output / f"{a.stage}-{kind}-{steps}"
    if a.stage == "flow" and not (run / "auxiliary").exists():
        shutil.copytree(a.run / "auxiliary", run / "auxiliary")
    settled = load_config(a.run / "config.yaml", [*QUIET, *settings_of(kind, config, a.stage, steps)])
    train(settled, run, stages=[f"weak-{a.stage}"], device=a.device)
    return load_network(run, f"weak-{a.stage}", settled), steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--stage", choices=("flow", "baseline"), default="flow")
    parser.add_argument("--data", required=True, help="the images it was trained on")
    parser.add_argument("--validation", help="held-out images; default: the data's own split")
    parser.add_argument("--features", default=CLASSIFIER, help="feature network, as for lediflow evaluate")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.015, 0.03, 0.06, 0.12])
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.125, 1.25])
    parser.add_argument("--steps", type=int, default=4, help="midpoint steps")
    parser.add_argument("--temperature", type=float, help="default: the run's own")
    parser.add_argument("--output", type=Path, default=Path("runs/weak"))
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    try:
        images = [f"data.{k}={v!r}" for k, v in (("train", a.data), ("validation", a.validation)) if v]
        judge = Judge(load_config(a.run / "config.yaml", images), features=a.features, device=a.device)
        own = a.run / a.stage  # a run of these stages alone keeps its pipeline above
        pipeline = load_pipeline(own if (own / "pipeline").exists() else a.run).to(a.device)
        pipeline.set_progress_bar_config(disable=True)

        def distance(strength: float) -> str:
            made = pipeline(
                judge.count, steps=a.steps, solver="midpoint", autoguidance=strength, batch_size=64,
                output_type="pt", **({} if a.temperature is None else {"temperature": a.temperature}),
            )  # fmt: skip
            return f"{judge.distance(made.images):.3g}"

        rows = [["none", "", distance(1.0), *[""] * (len(a.strengths) - 1)]]
        for kind in a.kinds:
            for share in a.shares:
                network, steps = worse_network(kind, share, a)
                pipeline.register_modules(weak_flow=network.to(a.device))
                rows.append([kind, str(steps), *map(distance, a.strengths)])
                print(rows[-1], file=sys.stderr, flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(markdown_table(["worse network", "its steps", *(f"w {w:g}" for w in a.strengths)], rows))
    print(f"\nheld-out images {judge.floor:.3g}")


if __name__ == "__main__":
    main()
