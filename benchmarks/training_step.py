"""A training step of the flow on this machine: time, share of the rate of a large matmul, peak memory.

    python benchmarks/training_step.py ffhq-256-sdv --batch-size 4
    python benchmarks/training_step.py ffhq-256-sdv --batch-size 4 --gradient-checkpointing

Forward, backward and AdamW with fp32 weights under autocast, untrained, on random images. Stop other work
first.
"""

import argparse
import json
import sys

import torch
from flops import matmul_rate, velocity_flops
from table1 import inputs

from lediflow import UserError
from lediflow.devices import DTYPES, check_device, settle_precision
from lediflow.evaluation.latency import compare, peak_memory
from lediflow.flow import matching_loss, phi
from lediflow.training.builders import build_flow
from lediflow.training.config import load_config


def measure(a):
    device = check_device(a.device)
    settled = settle_precision(a.dtype, device)
    dtype = DTYPES[settled] or torch.float32
    network = build_flow(load_config(a.preset, a.settings)).to(device).train()
    if a.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    network.compile_as(a.compile)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=device.type in ("cpu", "cuda"))
    y, _, conditions = inputs(network, a.batch_size, device, torch.float32)
    x, t = torch.randn_like(y), torch.rand(a.batch_size, device=device)

    def step():
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = matching_loss(network(phi(x, y, t), t, conditions), x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    taken = compare({"step": step}, images=a.batch_size, repeats=a.repeats, device=device)["step"]
    with peak_memory(device) as peak:
        step()
    rate = matmul_rate(device, dtype)
    return {
        "preset": a.preset,
        "dtype": settled,
        "batch_size": a.batch_size,
        "compile": a.compile,
        "gradient_checkpointing": a.gradient_checkpointing,
        "ms_per_step": round(taken.ms_per_image * a.batch_size, 1),
        "images_per_second": round(taken.images_per_second, 2),
        # forward once, backward twice; what checkpointing computes again is no useful work
        "share_of_matmul": round(3 * velocity_flops(network) * taken.images_per_second / rate, 3),
        "peak_memory_gb": round(peak[0] / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", help="or YAML file")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="a.b=value")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--compile", choices=("none", "blocks", "model"), default="none")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--device")
    a = parser.parse_args()
    try:
        print(json.dumps(measure(a), indent=1))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
