"""All starts of the upsampler at equal time: train each, measure and show what it makes of held-out images.

    python benchmarks/upsampling.py train --data emoji-train.parquet --seconds 360 --output runs/starts
    python benchmarks/upsampling.py measure runs/starts --data emoji-validation.parquet --features MODEL
    python benchmarks/upsampling.py seams runs/starts/coupled --data emoji-validation.parquet

`train` times a few steps of each stage first, and gives every start as many steps as fit in the seconds; a
start that has two stages shares them. Everything is compared with the same seed, network and batch. `measure`
writes table.md, results.json, examples.png and path.png (figure 8) beside the runs. Times are of the
processor on a CPU, so that other work on the machine does not count, and of the clock on a GPU. `seams`
enlarges held-out images as they are, whole and in tiles of several sizes, and compares the two.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from lediflow import UserError
from lediflow.data.images import ImageData
from lediflow.evaluation.plots import labelled_grid
from lediflow.evaluation.tables import markdown_table
from lediflow.evaluation.upsampling import HeldOut, along_the_path, measure, of_filter, of_stage
from lediflow.files import write_text
from lediflow.metrics.features import open_features
from lediflow.pictures import to_float
from lediflow.pipelines.load import load_upsampler
from lediflow.training.config import load_config
from lediflow.training.rehearsal import rehearse
from lediflow.training.run import train

# each start, the stages that it takes, and their share of its time
STARTS = {
    "coupled": {"upsampler": 1.0},
    "one evaluation": {"upsampler": 0.7, "upsampler-meanflow": 0.3},
    "learned": {"upsampler-prior": 0.1, "upsampler-learned": 0.9},
    "learned one evaluation": {
        "upsampler-prior": 0.07,
        "upsampler-learned": 0.63,
        "upsampler-learned-meanflow": 0.3,
    },
    "gaussian": {"upsampler-gaussian": 1.0},
    "diffusion": {"upsampler-diffusion": 1.0},
    "regression": {"upsampler-regression": 1.0},
}
FILTERS = ("nearest", "bicubic", "lanczos")
ONCE = ("regression", "one evaluation", "learned one evaluation")  # whose number of steps is one


def folder_of(output: Path, start: str) -> Path:
    return output / start.replace(" ", "-")


def train_starts(a):
    settings = [*a.settings, f"data.train={a.data}"]
    stages = list(dict.fromkeys(stage for name in a.starts for stage in STARTS[name]))
    timed = rehearse(load_config(a.preset, settings), stages, a.device)["stages"]
    ms = {estimate.stage: estimate.ms_per_step for estimate in timed}
    for name in a.starts:
        steps = {
            stage: max(1, round(1000 * a.seconds * share / ms[stage]))
            for stage, share in STARTS[name].items()
        }
        if a.steps_of_coupled is not None:  # the same ratios, whatever this machine is busy with
            rate = a.steps_of_coupled * ms["upsampler"]
            steps = {stage: max(1, round(rate * share / ms[stage])) for stage, share in STARTS[name].items()}
        print(f"{name}: {steps}", file=sys.stderr, flush=True)
        counted = [f"training.{stage.replace('-', '_')}.steps={n}" for stage, n in steps.items()]
        config = load_config(a.preset, [*settings, *counted])
        train(config, folder_of(a.output, name), stages=list(steps), device=a.device)


def measure_starts(a):
    network = None if a.features is None else open_features(a.features, a.device or "cpu")
    rows, pictures = [], {}
    for name in a.starts:
        run = folder_of(a.output, name)
        if not run.is_dir():
            continue
        held = HeldOut(run, a.data, count=a.count, batch_size=a.batch_size, device=a.device or "cpu")
        stage = held.stage(list(STARTS[name])[-1])
        if not pictures:
            pair = next(held.pairs(stage))
            pictures["real"], pictures["low"] = pair.high[: a.columns], None
            for way in FILTERS:
                row, shown = measure(held, stage, of_filter(way), network, patch=a.patch)
                rows.append({"start": way, "steps": "", **row})
                if way != "nearest":
                    pictures[way] = to_float(shown[: a.columns])
                else:
                    pictures["low"] = to_float(shown[: a.columns])
        ways = [(n, None) for n in ([1] if name in ONCE else a.steps)]
        if a.dopri5 and name in ("coupled", "learned", "gaussian"):
            ways.append((1, "dopri5"))
        for steps, solver in ways:
            row, shown = measure(held, stage, of_stage(held, stage, steps, solver), network, patch=a.patch)
            rows.append({"start": name, "steps": solver or steps, **row})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            pictures[f"{name}\n{solver or steps}"] = to_float(shown[: a.columns])
        if name == "coupled":
            stage.solver = "euler"
            path = along_the_path(held, stage, images=a.columns)
            labelled_grid(
                {f"t = {i / (len(path) - 1):.1f}": state for i, state in enumerate(path)},
                a.output / "path.png",
                scale=1,
            )
    if not rows:
        raise UserError(f"{a.output} has none of {', '.join(a.starts)}; train them first")
    labelled_grid(pictures, a.output / "examples.png", scale=1)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    write_text(a.output / "results.json", json.dumps(rows, indent=1))
    write_text(a.output / "table.md", table := markdown_table(columns, cells) + "\n")
    print(table)


@torch.no_grad()
def measure_seams(a):
    """How far an image made in tiles is from the one made whole, and the steps across the tiles' edges.

    The latter as a multiple of those in the image made whole: 1 is no seam.
    """
    model = load_upsampler(a.run).to(a.device or "cpu")
    model.set_progress_bar_config(disable=True)
    data = ImageData(a.data, split="validation", image_size=a.side, flip=False)
    low = to_float(torch.stack([data[i]["image"] for i in range(min(a.count, len(data)))]))
    options = {"num_inference_steps": a.steps, "output_type": "pt", "seed": 0}
    whole, rows = model(low, **options).images, []
    for tile in a.tiles:
        made = model(low, tile_size=tile, **options).images
        tiles = model.settled(a.steps, None, None, None, tile, None).windows(whole.shape[2:])
        edges = sorted({window.columns.start for window in tiles} - {0})
        steps, real = (x.diff(dim=-1).abs()[..., [e - 1 for e in edges]].mean() for x in (made, whole))
        rows.append(
            {
                "tile": tile,
                "tiles": len(tiles),
                "rms difference": float((made - whole).square().mean().sqrt()),
                "step across edges": float(steps / real) if edges else "",
            }
        )
    print(markdown_table(list(rows[0]), [[_cell(value) for value in row.values()] for row in rows]))


def _cell(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training, measuring = commands.add_parser("train"), commands.add_parser("measure")
    seams = commands.add_parser("seams")
    for command in (training, measuring, seams):
        command.add_argument("--data", required=True, help="images, or latents in pairs")
        command.add_argument("--device")
    for command in (training, measuring):
        command.add_argument("--starts", default=",".join(STARTS), help="comma-separated")
    training.add_argument("--preset", default="upsample-emoji", help="or a YAML file")
    training.add_argument("--set", dest="settings", action="append", default=[], help="a.b=value")
    training.add_argument("--seconds", type=float, default=360, help="of training, for each start")
    training.add_argument(
        "--steps-of-coupled", type=int, help="instead of seconds: steps of the coupled start; others alike"
    )
    training.add_argument("--output", type=Path, default=Path("runs/starts"))
    measuring.add_argument("output", type=Path, help="where the starts were trained")
    measuring.add_argument("--features", help="feature network, as for lediflow evaluate; none: no distances")
    measuring.add_argument("--count", type=int, default=200, help="held-out images")
    measuring.add_argument("--batch-size", type=int, default=16)
    measuring.add_argument("--steps", default="1,2,4,10,50", help="comma-separated")
    measuring.add_argument("--dopri5", action="store_true", help="also by the adaptive solver")
    measuring.add_argument("--patch", type=int, default=32, help="side of the squares of patch distances")
    measuring.add_argument("--columns", type=int, default=8, help="images in the pictures")
    seams.add_argument("run", help="run folder or saved pipeline of an upsampler of pixels")
    seams.add_argument("--side", type=int, default=128, help="of the images that are enlarged")
    seams.add_argument("--tiles", default="64,128,256", help="sides of the tiles, comma-separated")
    seams.add_argument("--count", type=int, default=16, help="images")
    seams.add_argument("--steps", type=int, default=4)
    a = parser.parse_args()
    if a.command != "seams":
        a.starts = a.starts.split(",")
        unknown = [name for name in a.starts if name not in STARTS]
        if unknown:
            sys.exit(f"error: unknown start {unknown[0]!r}; choose from {', '.join(STARTS)}")
    try:
        if a.command == "train":
            train_starts(a)
        elif a.command == "seams":
            a.tiles = [int(n) for n in a.tiles.split(",")]
            measure_seams(a)
        else:
            a.steps = [int(n) for n in a.steps.split(",")]
            measure_starts(a)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
