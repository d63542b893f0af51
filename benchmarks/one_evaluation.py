"""What one image costs, by part: one evaluation of each network, and plain flow matching in midpoint steps.

    python benchmarks/one_evaluation.py
    python benchmarks/one_evaluation.py faces-64 --batch-sizes 64 --eager
    python benchmarks/one_evaluation.py faces-32 --set auxiliary.decoder_widths=null  # as wide as the encoder

Prints ms per image. Everything of a row takes turns: the noise of w and x, one evaluation of the sampler, the
decoder and the flow with average velocity, and whole requests of both pipelines, as they are and compiled by
their method `compile`, in which the parts cannot be told apart. Weights are untrained, which takes the same
time. Compiling takes minutes. Stop other work first, or set OMP_NUM_THREADS=1 and count with --clock cpu.
"""

import argparse
import copy
import json
import sys
import time

import torch
from table1 import baseline_of

from lediflow import UserError
from lediflow.conditions import Conditions
from lediflow.devices import DTYPES
from lediflow.evaluation.latency import compare
from lediflow.evaluation.tables import markdown_table
from lediflow.pipelines.lediflow import LeDiFlowPipeline
from lediflow.sources import image_noise
from lediflow.training.builders import build_auxiliary, build_flow, build_sampler
from lediflow.training.config import load_config

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
OURS, FM = "LeDiFlow", "FM"


def pipelines(config, device, dtype):
    """LeDiFlow with average velocities and plain flow matching with the same flow network, by name."""
    ours = LeDiFlowPipeline(
        auxiliary=build_auxiliary(config).eval(),
        flow=build_flow(config, average_velocity=True).eval(),
        sampler=build_sampler(config, average_velocity=True).eval(),
    )
    found = {OURS: ours, FM: baseline_of(ours)}
    for pipeline in found.values():
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device, dtype)
    return found


def compiled(pipeline):
    """A compiled copy."""
    copied = type(pipeline)(**copy.deepcopy(pipeline.components))
    copied.set_progress_bar_config(disable=True)
    copied.compile()
    return copied


def parts(ours, batch):
    """What happens once for a batch of images, by name."""
    device = ours.device
    shapes = {"w": ours.auxiliary.z_shape, "x": ours.sample_shape}

    def noise():
        return [
            image_noise(shape, seed=0, indices=range(batch), stream=stream, device=device)
            for stream, shape in shapes.items()
        ]

    z, x = noise()
    t, r = torch.zeros((), device=device), torch.ones((), device=device)
    label = torch.zeros(batch, dtype=torch.long, device=device) if ours.flow.classes() else None
    labels = Conditions(label=label)
    return {
        "noise": noise,
        "sampler": lambda: ours.sampler(z, t, labels, r),
        "decoder": lambda: ours.auxiliary.decode(z),
        "flow": lambda: ours.flow(x, t, labels.also(z=z), r),
    }


def requests(found, batch, fm_steps):
    """A whole request of each pipeline, by name."""
    ways = {OURS: {}, FM: {"solver": "midpoint", "steps": fm_steps}}

    def call(pipeline, options):
        kind = "latent" if pipeline.config.codec_space else "pt"
        return lambda: pipeline(batch, batch_size=batch, output_type=kind, **options)

    return {name: call(pipeline, ways[name.split(" compiled")[0]]) for name, pipeline in found.items()}


@torch.no_grad()
def measure(preset, settings, batches, device, dtype, repeats, compile, clock, fm_steps):
    """One record for each batch size."""
    found = pipelines(load_config(preset, settings), device, dtype)
    if compile:
        found |= {f"{name} compiled": compiled(pipeline) for name, pipeline in found.items()}
    for batch in batches:
        calls = parts(found[OURS], batch) | requests(found, batch, fm_steps)
        times = compare(calls, images=batch, repeats=repeats, warmup=2, device=device, clock=clock)
        record = {"preset": preset, "batch": batch, "FM steps": fm_steps}
        record |= {name: round(time.ms_per_image, 3) for name, time in times.items()}
        for way in ("", " compiled") if compile else ("",):
            gain = times[FM + way].ms_per_image / times[OURS + way].ms_per_image
            record[f"gain{way}"] = round(gain, 2)
        record["largest spread"] = round(max(times[name].spread for name in found), 2)
        print(record, file=sys.stderr, flush=True)
        yield record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "presets", nargs="*", default=["digits", "faces-32", "faces-64"], help="or YAML files"
    )
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], help="a.b=value, for all presets"
    )
    parser.add_argument("--batch-sizes", default="1,64", help="comma-separated")
    parser.add_argument("--fm-steps", type=int, default=8, help="midpoint steps of plain flow matching")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--eager", action="store_true", help="leave the compiled ones out")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: for one thread on a machine that others share"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    device, dtype = torch.device(a.device), DTYPES[a.dtype] or torch.float32
    batches = [int(n) for n in a.batch_sizes.split(",")]
    records = []
    try:
        for preset in a.presets:
            clock = CLOCKS[a.clock]
            records += measure(
                preset, a.settings, batches, device, dtype, a.repeats, not a.eager, clock, a.fm_steps
            )
    except UserError as error:
        sys.exit(f"error: {error}")
    if a.json:
        print(json.dumps(records, indent=1))
        return
    print(markdown_table(list(records[0]), [list(record.values()) for record in records]))


if __name__ == "__main__":
    main()
