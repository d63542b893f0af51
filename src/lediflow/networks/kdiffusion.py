"""Bring HDiT weights from k-diffusion (its `ImageTransformerDenoiserModelV2`) into a VelocityTransformer.

The structure is the same, so the same weights give the same output. What they mean is not: k-diffusion's
network is the inside of a preconditioned denoiser, called with log(sigma) / 4 in place of t. Use it as the
start of a training, or to compare the two implementations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lediflow.errors import UserError
from lediflow.networks.velocity import VelocityTransformer

# (pattern in k-diffusion, name here), the first that matches
NAMES = (
    (r"patch_in\.proj\.", "patch_in."),
    (r"time_in_proj\.", "time_in."),
    (r"class_emb\.", "embedders.label.embedding."),
    (r"mapping\.blocks\.(\d+)\.norm\.", r"mapping.norms.\1."),
    (r"mapping\.blocks\.(\d+)\.(up|down)_proj\.", r"mapping.blocks.\1.\2."),
    (r"(down|up)_levels\.", r"hourglass.\1."),
    (r"mid_level\.", "hourglass.middle."),
    (r"splits\.(\d+)\.fac$", r"hourglass.lerps.\1.factor"),
    (r"(merges|splits)\.", r"hourglass.\1."),
)
# inside a block
BLOCK_NAMES = (
    (".self_attn.norm.", ".attention_norm."),
    (".self_attn.qkv_proj.", ".attention.qkv."),
    (".self_attn.out_proj.", ".attention.out."),
    (".self_attn.scale", ".attention.scale"),
    (".ff.norm.", ".feed_forward_norm."),
    (".ff.up_proj.", ".feed_forward.up."),
    (".ff.down_proj.", ".feed_forward.down."),
)
FOLDED = ("time_emb.weight", "aug_emb.weight", "aug_in_proj.weight")


def convert_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return k-diffusion's weights under the names of a `VelocityTransformer` with time_bias=True.

    Args:
        state: state dict of an ImageTransformerDenoiserModelV2 (without its preconditioning wrapper).

    Returns:
        The same tensors by our names. The augmentation embedding at "no augmentation" is a constant, which
        becomes the bias of the time embedding.
    """
    converted = {
        _rename(name): tensor
        for name, tensor in state.items()
        if name not in FOLDED and not name.endswith("pos_emb.freqs")  # constants, here a table for each grid
    }
    converted["time_features.frequencies"] = state["time_emb.weight"][:, 0]
    # Fourier features of nine zeros: every cosine 1, every sine 0
    cosines = state["aug_in_proj.weight"].shape[1] // 2
    converted["time_in.bias"] = state["aug_in_proj.weight"][:, :cosines].sum(1)
    return converted


def _rename(name: str) -> str:
    for pattern, ours in NAMES:
        renamed, count = re.subn("^" + pattern, ours, name)
        if count:
            name = renamed
            break
    for theirs, ours in BLOCK_NAMES:
        name = name.replace(theirs, ours)
    return name


def load_k_diffusion(path: str | Path) -> VelocityTransformer:
    """Load a slim checkpoint made by k-diffusion's `convert_for_inference.py` (safetensors with its config).

    Raises:
        UserError: not such a file, or a network that has no counterpart here.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # in fp32, for half precision would round the sum that folds the augmentation embedding
            state = {
                name.removeprefix("inner_model."): file.get_tensor(name).float()
                for name in file.keys()  # noqa: SIM118
            }
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is not a safetensors file ({error}); make it with k-diffusion's convert_for_inference.py"
        ) from None
    if "config" not in metadata:
        raise UserError(f"{path} has no k-diffusion config; make it with its convert_for_inference.py")
    network = VelocityTransformer(**_sizes(json.loads(metadata["config"])["model"], state, path))
    network.load_state_dict(convert_weights(state))
    return network.eval()


def _sizes(model: dict[str, Any], state: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """Arguments of our network for the `model` section of a k-diffusion config.

    Raises:
        UserError: a kind of network or attention that has no counterpart here.
    """

    def refuse(what: str) -> UserError:
        return UserError(f"{path}: {what} has no counterpart here")

    if model.get("type") != "image_transformer_v2":
        raise refuse(f"a model of type {model.get('type')!r}")
    widths, patch = model["widths"], model["patch_size"]
    neighborhood = {"type": "neighborhood", "d_head": 64, "kernel_size": 7}
    default = [neighborhood] * (len(widths) - 1) + [{"type": "global", "d_head": 64}]
    attention = model.get("self_attns") or default
    kinds = [a["type"] for a in attention]
    local = kinds.count("neighborhood")
    if kinds != ["neighborhood"] * local + ["global"] * (len(kinds) - local):
        raise refuse(f"attention {kinds}")
    if len({a.get("d_head", 64) for a in attention}) > 1:
        raise refuse("a head width for each level")
    if len({a.get("kernel_size", 7) for a in attention[:local]}) > 1:
        raise refuse("a kernel size for each level")
    if patch[0] != patch[1]:
        raise refuse(f"patch {patch}")
    if "mapping_cond_in_proj.weight" in state:
        raise refuse("a mapping condition")
    d_ffs = model.get("d_ffs") or [3 * width for width in widths]
    ratios = {d_ff / width for d_ff, width in zip(d_ffs, widths, strict=True)}
    mapping_width = model.get("mapping_width", 256)
    ratios.add((model.get("mapping_d_ff") or 3 * mapping_width) / mapping_width)
    if len(ratios) > 1:
        raise refuse("d_ff that is not one multiple of the widths")
    return {
        "sample_size": model["input_size"],
        "in_channels": model["input_channels"],
        "patch_size": patch[0],
        "widths": widths,
        "depths": model["depths"],
        "d_head": attention[0].get("d_head", 64),
        "ff_factor": ratios.pop(),
        "kernel_size": attention[0].get("kernel_size", 7),
        "global_levels": len(kinds) - local,
        "mapping_width": mapping_width,
        "mapping_depth": model.get("mapping_depth", 2),
        "conditions": _conditions(state),
        "time_bias": True,
    }


def _conditions(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The classes, for which both networks keep a last row for "no class"."""
    if "class_emb.weight" not in state:
        return {}
    return {"label": {"embedder": "class", "classes": len(state["class_emb.weight"]) - 1}}
