"""What enlarging costs: operations of a step, time against pixels, and memory with tiles.

    python benchmarks/upsampling_cost.py flops         # 256 -> 1024 px in latents, the 113M U-Net, SD's codec
    python benchmarks/upsampling_cost.py sizes         # 512, 1024, 2048 px in tiles of 256, small networks
    python benchmarks/upsampling_cost.py sizes --width 128 --multipliers 1,2,3,4 --depth 3 \
        --codec-widths 128,256,512,512 --tile-size 512     # the paper's networks

Weights are random, which costs the same. `flops` counts the matrix products of one call of the pipeline, of
one evaluation of its network, and of the codec. It runs on torch's meta device, which computes nothing; the
network takes the steps of an average velocity there, one evaluation each as Euler's. `sizes` runs one
process for each size, and prints its seconds (of the processor, on a CPU) and the peak of its memory, all of
the process included: for the flow alone, which makes latents, and with the codec.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time

import torch
from diffusers import AutoencoderKL
from flops import count_flops

from lediflow.codecs import Codec, CodecSpace, latent_digest
from lediflow.conditions import Conditions
from lediflow.devices import check_device
from lediflow.evaluation.latency import peak_memory, time_once
from lediflow.evaluation.tables import markdown_table
from lediflow.pipelines.upsample import FlowUpsamplePipeline
from lediflow.tiles import windows

CONDITIONS = {
    "image": {"embedder": "grid", "channels": 4, "size": 128},
    "noise_level": {"embedder": "scalar", "largest": 999},
}


def upsampler(a) -> FlowUpsamplePipeline:
    """An upsampler with a U-Net in the latents of a codec with SD's factor, 8."""
    from lediflow.networks.unet import VelocityUNet

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=a.codec_widths, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=512,
        norm_num_groups=min(32, a.codec_widths[0]),
    ).eval()  # fmt: skip
    codec = Codec(vae)
    space = CodecSpace("random", codec.hash, codec.factor, 4, (0.0,) * 4, (1.0,) * 4, latent_digest(vae))
    network = VelocityUNet(
        128, 4, a.width, a.multipliers, a.depth, conditions=CONDITIONS, average_velocity=True
    ).eval()  # fmt: skip
    pipeline = FlowUpsamplePipeline(network, vae, codec_space=space.to_dict()).to(a.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def flops(a) -> dict:
    """Operations of a call with --steps steps, of one evaluation and of the codec, for one image."""
    pipeline = upsampler(a)
    side = a.sizes[0] // 8
    high = torch.zeros(1, 4, side, side, device=a.device)
    t, r = (torch.full((), value, device=a.device) for value in (0.0, 1.0))
    told = Conditions(image=high, noise_level=torch.zeros(1, device=a.device))
    evaluation = count_flops(lambda: pipeline.flow(high, t, told, r))
    tiles = windows((side, side), side, 0)
    level = torch.full((1,), 200.0, device=a.device)

    def call():
        x = pipeline.start(high, torch.zeros_like(high), level, tiles)
        pipeline.carry(x, high, level, tiles, solver="mean", steps=a.steps)

    spent = count_flops(call)
    return {
        "pixels": a.sizes[0],
        "parameters": sum(p.numel() for p in pipeline.flow.parameters()),
        "steps": a.steps,
        "GFLOP of an evaluation": round(evaluation / 1e9, 1),
        "GFLOP of a call without the codec": round(spent / 1e9, 1),
        "evaluations a step": spent / a.steps / evaluation,
        "GFLOP of the codec": round(count_flops(lambda: pipeline.vae.decode(high)) / 1e9, 1),
    }


def one_size(a, pixels: int, results) -> None:
    """Put seconds, tiles and memory of calls for one size, without the codec and with it, into a queue."""
    pipeline = upsampler(a)
    low = torch.randn(1, 4, pixels // 32, pixels // 32, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": a.steps, "tile_size": a.tile_size, "solver": "euler"}
    tile = a.tile_size // 32
    pipeline(low[..., :tile, :tile], output_type="pt", **options)  # warm
    row: dict = {"pixels": pixels}
    for name, output_type in (("flow", "latent"), ("all", "pt")):
        made = []

        def call(output_type=output_type, made=made):
            made.append(pipeline(low, output_type=output_type, **options).nfe["flow"])

        with peak_memory(a.device) as peak:
            clock = time.process_time if a.device.type == "cpu" else None  # other work may run beside
            row[f"{name}, seconds"] = time_once(call, a.device, clock)
        row["tiles"], row[f"{name}, peak"] = made[0] // a.steps, peak[0]
    results.put(row)


def sizes(a) -> str:
    """A table over sizes, each in a process of its own."""
    start = multiprocessing.get_context("fork" if a.device.type == "cpu" else "spawn")
    rows = []
    for pixels in a.sizes:
        results = start.SimpleQueue()
        process = start.Process(target=one_size, args=(a, pixels, results))
        process.start()
        rows.append(results.get())
        process.join()
        print(rows[-1], file=sys.stderr)
    parts = ("flow", "all")
    table = markdown_table(
        [
            "pixels",
            "tiles",
            *(f"{part}, {what}" for part in parts for what in ("s", "s / megapixel", "peak GB")),
        ],
        [
            [
                f"{row['pixels']}x{row['pixels']}",
                row["tiles"],
                *(
                    text
                    for part in parts
                    for text in (
                        f"{row[f'{part}, seconds']:.2f}",
                        f"{row[f'{part}, seconds'] / row['pixels'] ** 2 * 1e6:.2f}",
                        f"{row[f'{part}, peak'] / 1e9:.3f}",
                    )
                ),
            ]
            for row in rows
        ],
    )
    more = math.log((rows[-1]["pixels"] / rows[0]["pixels"]) ** 2)
    said = []
    for part in parts:
        growth = math.log(rows[-1][f"{part}, seconds"] / rows[0][f"{part}, seconds"]) / more
        peaks = [row[f"{part}, peak"] for row in rows]
        said.append(
            f"{part}: time grows as pixels to the power of {growth:.2f}, peak memory by "
            f"{max(peaks) / min(peaks) - 1:.1%}"
        )
    return "\n".join([table, "", *said])


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["flops", "sizes"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--sizes", type=numbers, help="sides of the results, pixels")
    parser.add_argument("--tile-size", type=int, default=256)
    parser.add_argument("--width", type=int, help="base width of the U-Net, and so on")
    parser.add_argument("--multipliers", type=numbers)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--codec-widths", type=numbers)
    parser.add_argument("--device")
    a = parser.parse_args()
    paper = a.what == "flops"
    a.device = torch.device("meta") if paper else check_device(a.device)
    a.sizes = a.sizes or ([1024] if paper else [512, 1024, 2048])
    a.width = a.width or (128 if paper else 32)
    a.multipliers = a.multipliers or ([1, 2, 3, 4] if paper else [1, 2])
    a.depth = a.depth or (3 if paper else 1)
    a.codec_widths = a.codec_widths or ([128, 256, 512, 512] if paper else [16, 16, 16, 16])
    print(json.dumps(flops(a), indent=1) if paper else sizes(a))


if __name__ == "__main__":
    main()
