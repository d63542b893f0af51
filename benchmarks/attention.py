"""Backends of neighbourhood attention beside each other: forward + backward, 4 heads of 64, K = 7.

    python benchmarks/attention.py

Prints ms by grid and backend, the gain over a dense mask, and the time per token, for every backend that this
machine has. Stop other work first.
"""

import argparse
import json

import torch

from lediflow.devices import DTYPES
from lediflow.evaluation.latency import compare
from lediflow.evaluation.tables import markdown_table
from lediflow.networks.attention import BACKENDS, missing_package, self_attention

DENSE_UP_TO = 64 * 64  # a mask over more tokens takes gigabytes and minutes


def call(backend, side, batch, kernel, dtype, device):
    q, k, v = (
        torch.randn(batch, side * side, 4, 64, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )

    def run():
        self_attention(q, k, v, (side, side), kernel, backend).sum().backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", default="16,32,64,128", help="of the square grids")
    parser.add_argument("--tokens", type=int, default=16384, help="images in a batch make this many tokens")
    parser.add_argument("--kernel", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    device, dtype = torch.device(a.device), DTYPES[a.dtype] or torch.float32
    there = [b for b in BACKENDS if missing_package(b) is None]
    if device.type == "cpu":
        there = ["dense", "tiles"]  # the others have no backward there
    calls = {}
    for side in map(int, a.sides.split(",")):
        batch = max(1, a.tokens // side**2)
        for backend in there:
            if backend != "dense" or side * side <= DENSE_UP_TO:
                calls[side, backend] = (
                    batch,
                    call(backend, side, batch, a.kernel, dtype, device),
                )
    times = compare(
        {str(key): run for key, (_, run) in calls.items()}, images=1, repeats=a.repeats, device=device
    )
    records = []
    for (side, backend), (batch, _) in calls.items():
        ms = times[str((side, backend))].ms_per_image
        dense = times.get(str((side, "dense")))
        records.append(
            {
                "grid": f"{side}x{side}",
                "batch": batch,
                "backend": backend,
                "ms": round(ms, 2),
                "us_per_token": round(1000 * ms / batch / side**2, 3),
                "times_dense": round(dense.ms_per_image / ms, 2) if dense else None,
                "spread": round(times[str((side, backend))].spread, 2),
            }
        )
    if a.json:
        print(json.dumps(records, indent=1))
        return
    print(markdown_table(list(records[0]), [list(r.values()) for r in records]))


if __name__ == "__main__":
    main()
