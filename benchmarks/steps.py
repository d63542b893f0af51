"""Quality against steps and time of a finished run: LeDiFlow beside plain flow matching.

    python benchmarks/steps.py runs/faces-32 --classifier-steps 1500

The data must have classes, for quality is a Frechet distance in the features of a small classifier trained on
them. Writes table.md, quality.png, grid.png and results.json into the run folder. Stop other work first: the
milliseconds are those of this machine as it is.
"""

import argparse
import sys

from lediflow import UserError
from lediflow.evaluation.compare import compare_run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder with all four stages trained")
    parser.add_argument("--steps", default="1,2,4,8", help="flow steps, comma-separated")
    parser.add_argument("--solver", default="midpoint")
    parser.add_argument("--latent-steps", type=int, default=2)
    parser.add_argument("--groups", type=int, default=3, help="images in multiples of the held-out count")
    parser.add_argument("--classifier-steps", type=int, default=400)
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    try:
        result = compare_run(
            a.run,
            steps=[int(n) for n in a.steps.split(",")],
            solver=a.solver,
            latent_steps=a.latent_steps,
            groups=a.groups,
            classifier_steps=a.classifier_steps,
            dtype=a.dtype,
            device=a.device,
            seed=a.seed,
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{result.table}\n\nfloor {result.floor:.2f}. {result.verdict}")
    for path in result.files:
        print(path)


if __name__ == "__main__":
    main()
