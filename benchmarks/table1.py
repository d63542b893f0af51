"""Table 1 of the paper on this machine: LeDiFlow beside plain flow matching, and each network's work.

    python benchmarks/table1.py ffhq-256 --batch-size 1 --repeats 2
    python benchmarks/table1.py ffhq-256-sdv --codec stabilityai/sd-vae-ft-mse --json
    python benchmarks/table1.py ffhq-256 --attention dense --set data.image_size=128

Times one evaluation of each network, with its GFLOP and its share of the rate of a large matmul (roofline),
and the rows of Table 1, split by network as evaluations x time of one. A model with an average velocity has a
row of one step too, which stands against 8 midpoint steps of plain flow matching. Plain flow matching has the
same network without z, untrained; a preset is untrained altogether, which takes the same time. Stop other
work first.
"""

import argparse
import json
import os
import sys

import torch
from flops import count_flops, matmul_rate, velocity_flops

from lediflow import UserError
from lediflow.codecs import Codec
from lediflow.devices import DTYPES, check_device, settle_precision
from lediflow.evaluation.latency import compare
from lediflow.evaluation.request import latent_words
from lediflow.evaluation.speed import attention_backends, pipeline_of
from lediflow.evaluation.tables import markdown_table
from lediflow.networks.attention import VARIABLE, check_backend
from lediflow.networks.conditions import example_conditions
from lediflow.networks.hourglass import pair
from lediflow.networks.model import Network
from lediflow.networks.velocity import VelocityTransformer
from lediflow.ode import in_words
from lediflow.pipelines.flow_matching import FlowMatchingPipeline
from lediflow.pipelines.lediflow import LeDiFlowPipeline

# solver, steps of plain flow matching, steps of LeDiFlow's flow and latent sampler
TABLE_1 = (("midpoint", 8, 2, 4), ("heun3", 8, 1, 2))
FM_SOLVER = "midpoint"  # of plain flow matching, that one evaluation of an average velocity stands beside
OURS, FM = "LeDiFlow", "flow matching"


def baseline_of(pipeline):
    """Plain flow matching with the flow's network without z and average velocity, untrained."""
    config = {k: v for k, v in pipeline.flow.config.items() if not k.startswith("_")}
    conditions = {name: of for name, of in config["conditions"].items() if name != "z"}
    flow = VelocityTransformer(**config | {"conditions": conditions, "average_velocity": False}).eval()
    return FlowMatchingPipeline(flow=flow, codec_space=pipeline.config.codec_space)


def inputs(network, batch, device, dtype):
    """Arguments of one evaluation: x, t, conditions."""
    c = network.config
    x = torch.randn(batch, c.in_channels, *pair(c.sample_size), device=device, dtype=dtype)
    return [x, torch.tensor(0.5, device=device), example_conditions(c.conditions, batch).to(device)]


@torch.no_grad()
def networks(pipeline, codec, batch, repeats, device, dtype, rate):
    """Facts of one evaluation of each network for one image, by name."""
    flow, sampler = (inputs(n, batch, device, dtype) for n in (pipeline.flow, pipeline.sampler))
    z = torch.randn(batch, *pipeline.auxiliary.z_shape, device=device, dtype=dtype)
    parts = {
        "sampler": (pipeline.sampler, lambda: pipeline.sampler(*sampler)),
        "decoder": (pipeline.auxiliary, lambda: pipeline.auxiliary.decode(z)),
        "flow": (pipeline.flow, lambda: pipeline.flow(*flow)),
    }
    if codec is not None:
        codec.model.to(device, dtype)
        parts["codec"] = (codec.model, lambda: codec.decode(flow[0]))
    calls = {name: call for name, (_, call) in parts.items()}
    times = compare(calls, images=batch, repeats=repeats, device=device)
    facts = {}
    for name, (network, call) in parts.items():
        closed_form = isinstance(network, VelocityTransformer)
        flops = velocity_flops(network) if closed_form else count_flops(call) / batch
        ms = times[name].ms_per_image
        facts[name] = {
            "parameters": sum(p.numel() for p in network.parameters()),
            "gflop": round(flops / 1e9, 3),
            "ms_per_image": round(ms, 3),
            "share_of_matmul": round(flops / (ms / 1000) / rate, 3),
        }
    return facts


def sampling(models, batch, repeats, device, per_evaluation):
    """One record for each row of Table 1."""
    rows = []
    for solver, fm_steps, steps, latent_steps in TABLE_1:
        rows.append((FM, {"solver": solver, "steps": fm_steps}))
        latent = {"latent_solver": solver, "latent_steps": latent_steps}
        rows.append((OURS, {"solver": solver, "steps": steps, **latent}))
    if models[OURS].flow.average_velocity:
        rows.append((OURS, models[OURS].settle(solver="mean")))
    nfe = [{} for _ in rows]

    def call(i):
        model, options = rows[i]
        kind = "latent" if models[model].config.codec_space else "pt"
        nfe[i] = models[model](batch, batch_size=batch, output_type=kind, **options).nfe

    calls = {str(i): lambda i=i: call(i) for i in range(len(rows))}
    times = compare(calls, images=batch, repeats=repeats, device=device)
    return [
        {
            "model": model,
            **options,
            "nfe": evaluations,
            "ms_per_image": round(time.ms_per_image, 3),
            "images_per_second": round(time.images_per_second, 3),
            "spread": round(time.spread, 3),
            "ms": {name: round(count * per_evaluation[name], 3) for name, count in evaluations.items()},
        }
        for (model, options), evaluations, time in zip(rows, nfe, times.values(), strict=True)
    ]


def speedups(rows):
    ms = {(row["model"], row["solver"]): row["ms_per_image"] for row in rows}
    return {
        solver: round(ms[FM, FM_SOLVER if solver == "mean" else solver] / taken, 2)
        for (model, solver), taken in ms.items()
        if model == OURS
    }


def report_of(a):
    device = check_device(a.device)
    if a.attention is not None:
        check_backend(a.attention)
        os.environ[VARIABLE] = a.attention
    settled = settle_precision(a.dtype, device)
    dtype = DTYPES[settled] or torch.float32
    ours = pipeline_of(a.model, a.settings, average_velocity=a.average_velocity)
    if not isinstance(ours, LeDiFlowPipeline):
        raise UserError(f"{a.model} is plain flow matching; give a LeDiFlow model, which is timed beside it")
    models = {FM: baseline_of(ours).to(device, dtype), OURS: ours.to(device, dtype)}
    for model in models.values():
        model.set_progress_bar_config(disable=True)
        for network in model.components.values():
            if isinstance(network, Network):
                network.compile_as(a.compile)
    rate = matmul_rate(device, dtype)
    codec = Codec.load(a.codec) if a.codec else None
    facts = networks(ours, codec, a.batch_size, a.repeats, device, dtype, rate)
    per_evaluation = {name: fact["ms_per_image"] for name, fact in facts.items()}
    rows = sampling(models, a.batch_size, a.repeats, device, per_evaluation)
    return {
        "model": a.model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": settled,
        "batch_size": a.batch_size,
        "compile": a.compile,
        "matmul_gflops": round(rate / 1e9, 1),
        "attention": attention_backends(ours.flow, device),
        "networks": facts,
        "sampling": rows,
        "speedup": speedups(rows),
    }


def show(report):
    print(
        f"{report['device']}, {report['threads']} threads, {report['dtype']}, batch {report['batch_size']}, "
        f"compile {report['compile']}; large matmul {report['matmul_gflops']:,} GFLOP/s; attention: "
        + ", ".join(f"{grid} {name}" for grid, name in report["attention"].items())
    )
    print("\nOne evaluation of each network:")
    headers = ["network", "parameters", "GFLOP / image", "ms / image", "share of matmul rate"]
    rows = [
        [name, f"{n['parameters']:,}", n["gflop"], n["ms_per_image"], f"{n['share_of_matmul']:.0%}"]
        for name, n in report["networks"].items()
    ]
    print(markdown_table(headers, rows))
    print("\nSampling (the split is evaluations x time of one):")
    split = ("sampler", "decoder", "flow")
    headers = ["model", "latent sampler", "flow", "ms / image", "images / s", *(f"{n} ms" for n in split)]
    rows = [
        [
            row["model"],
            latent_words(row),
            in_words(row["solver"], row["steps"]),
            row["ms_per_image"],
            row["images_per_second"],
            *(row["ms"].get(name, "") for name in split),
        ]
        for row in report["sampling"]
    ]
    print(markdown_table(headers, rows))
    against = {"mean": "one mean step against 8 midpoint steps"}
    for solver, factor in report["speedup"].items():
        print(f"LeDiFlow takes 1/{factor} of the time ({against.get(solver, solver)})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="preset, YAML file, run folder, saved pipeline or Hub id")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="a.b=value, of a preset")
    parser.add_argument("--average-velocity", action="store_true", help="a preset as refined")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--compile", choices=("none", "blocks", "model"), default="none")
    parser.add_argument("--attention", help="dense, tiles, flex or natten")
    parser.add_argument("--codec", help="also time this autoencoder; the rows leave it out")
    parser.add_argument("--device")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    try:
        report = report_of(a)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(report, indent=1)) if a.json else show(report)


if __name__ == "__main__":
    main()
