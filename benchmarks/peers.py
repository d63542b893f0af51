"""Our network beside its peers in one run, in turns: k-diffusion's HDiT and diffusers' DiT.

    pip install -r benchmarks/requirements-peers.txt
    python benchmarks/peers.py --k-diffusion PATH/TO/k-diffusion

The sizes are those of the preset ffhq-256-sdv (154M parameters, 32x32x4 latents). Two of our rows have global
attention and neighbourhood attention at the first level, k-diffusion's have global and shifted windows (its
neighbourhood attention needs NATTEN). DiT has patches of 2 and as many layers as make the same number of
parameters. Stop other work first.
"""

import argparse
import importlib
import json
import os
import sys
import types
from pathlib import Path

import torch
from flops import count_flops, matmul_rate

from lediflow.devices import DTYPES
from lediflow.evaluation.latency import compare
from lediflow.evaluation.tables import markdown_table
from lediflow.networks.velocity import VelocityTransformer

SIZES = {
    "sample_size": 32,
    "in_channels": 4,
    "patch_size": 1,
    "widths": (512, 1024),
    "depths": (2, 8),
    "d_head": 64,
    "mapping_width": 768,
    "mapping_depth": 2,
}


def import_k_diffusion(checkout, compiled=False):
    """Import the transformer module of a k-diffusion checkout without the rest of the package.

    Its other modules need torchvision and more, of which the transformer uses nothing. `compiled` is its own
    switch, which compiles norms, rotations and GEGLU.
    """
    os.environ["K_DIFFUSION_USE_COMPILE"] = "1" if compiled else "0"
    root = Path(checkout) / "k_diffusion"
    if not (root / "models" / "image_transformer_v2.py").is_file():
        raise FileNotFoundError(f"{checkout} is no checkout of k-diffusion (no {root.name}/models in it)")

    def module(name, path=None):
        sys.modules[name] = types.ModuleType(name)
        if path is not None:
            sys.modules[name].__path__ = [str(path)]

    module("k_diffusion", root)
    module("k_diffusion.models", root / "models")
    module("k_diffusion.utils")
    module("k_diffusion.sampling")
    return importlib.import_module("k_diffusion.models.image_transformer_v2")


def k_diffusion_model(k, first_level, sizes=SIZES):
    """Build k-diffusion's model of the same sizes; `first_level` is the attention above the lowest."""
    widths, depths, width = sizes["widths"], sizes["depths"], sizes["mapping_width"]
    lowest = k.GlobalAttentionSpec(sizes["d_head"])
    levels = [
        k.LevelSpec(d, w, 3 * w, lowest if i == len(widths) - 1 else first_level, 0.0)
        for i, (d, w) in enumerate(zip(depths, widths, strict=True))
    ]
    mapping = k.MappingSpec(sizes["mapping_depth"], width, 3 * width, 0.0)
    patch = (sizes["patch_size"],) * 2
    return k.ImageTransformerDenoiserModelV2(
        levels, mapping, sizes["in_channels"], sizes["in_channels"], patch
    )


def dit_model(parameters):
    """Build diffusers' DiT on the same latents with the number of layers that comes nearest in size."""
    from diffusers import DiTTransformer2DModel

    def build(layers):
        return DiTTransformer2DModel(
            num_attention_heads=12, attention_head_dim=64, in_channels=4, num_layers=layers, sample_size=32
        )

    with torch.device("meta"):
        one, two = (sum(p.numel() for p in build(n).parameters()) for n in (1, 2))
    return build(round((parameters - one) / (two - one)) + 1)


def models(checkout, compiled):
    ours = VelocityTransformer(**SIZES)
    found = {
        "ours, neighbourhood 7": (ours, lambda m, x, t: m(x, t)),
        "ours, global": (VelocityTransformer(**SIZES, global_levels=2), lambda m, x, t: m(x, t)),
    }
    if checkout is not None:
        k = import_k_diffusion(checkout, compiled)
        heads = SIZES["d_head"]
        for name, spec in (
            ("shifted window 8", k.ShiftedWindowAttentionSpec(heads, 8)),
            ("global", k.GlobalAttentionSpec(heads)),
        ):
            found[f"k-diffusion, {name}"] = (k_diffusion_model(k, spec), lambda m, x, t: m(x, t + 0.5))
    dit = dit_model(sum(p.numel() for p in ours.parameters()))
    found["diffusers DiT"] = (
        dit,
        lambda m, x, t: (
            m(x, (1000 * t).long(), torch.zeros(len(x), dtype=torch.long, device=x.device)).sample
        ),
    )
    if compiled:
        for name, (model, _) in found.items():
            if name.startswith("ours"):
                model.compile_as("blocks")
            elif name == "diffusers DiT":
                for block in model.transformer_blocks:
                    block.compile()
    return found


def runs(found, batch, device, dtype):
    """Callables by name: forward, and forward + backward, under autocast."""
    x, t = torch.randn(batch, 4, 32, 32, device=device), torch.rand(batch, device=device)

    def forward(model, call):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return call(model, x, t)

    def inference(model, call):
        with torch.no_grad():
            forward(model, call)

    def training(model, call):
        forward(model, call).float().square().mean().backward()
        model.zero_grad()

    return {
        kind: {name: lambda fn=fn, m=m, call=call: fn(m, call) for name, (m, call) in found.items()}
        for kind, fn in (("forward", inference), ("forward + backward", training))
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--k-diffusion", metavar="PATH", help="checkout; left out, it is not measured")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", default="bf16", help="comma-separated: fp32, bf16")
    parser.add_argument("--compile", action="store_true", help="each as its authors provide for it")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    device = torch.device(a.device)
    found = {
        name: (m.to(device), call)
        for name, (m, call) in models(a.k_diffusion, a.compile).items()
        if a.only in name
    }
    records = []
    for name in a.dtypes.split(","):
        dtype = DTYPES[name] or torch.float32
        rate = matmul_rate(device, dtype)
        for kind, calls in runs(found, a.batch_size, device, dtype).items():
            times = compare(calls, images=a.batch_size, repeats=a.repeats, device=device)
            for model, call in calls.items():
                flops = count_flops(call) / a.batch_size
                records.append(
                    {
                        "model": model,
                        "parameters": sum(p.numel() for p in found[model][0].parameters()),
                        "dtype": name,
                        "kind": kind,
                        "ms_per_image": round(times[model].ms_per_image, 1),
                        "spread": round(times[model].spread, 2),
                        "gflop": round(flops / 1e9, 1),
                        "gflops": round(flops / times[model].ms_per_image / 1e6, 1),
                        "share_of_matmul": round(flops / times[model].ms_per_image * 1000 / rate, 3),
                        "matmul_gflops": round(rate / 1e9, 1),
                    }
                )
    if a.json:
        print(json.dumps(records, indent=1))
        return
    print(markdown_table(list(records[0]), [list(r.values()) for r in records]))


if __name__ == "__main__":
    main()
