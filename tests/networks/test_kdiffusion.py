"""k-diffusion's HDiT and ours: the same weights, the same output.

What k-diffusion itself made of fixed weights is kept in golden/k-diffusion.safetensors; with a checkout of
k-diffusion, which LEDIFLOW_K_DIFFUSION names, other weights are compared too. NATTEN, which its neighbourhood
attention calls, is there played by a few lines of gathered windows.
"""

import importlib.util
import json
import os
import sys
import types

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import save_file

from lediflow.conditions import Conditions
from lediflow.errors import UserError
from lediflow.networks.kdiffusion import convert_weights, load_k_diffusion
from lediflow.networks.velocity import VelocityTransformer

SIZES = {
    "sample_size": (32, 48),
    "in_channels": 3,
    "patch_size": 2,
    "widths": (32, 64, 64),
    "depths": (2, 1, 3),
    "d_head": 16,
    "mapping_width": 48,
    "mapping_depth": 2,
}


def windows(q, k, v, kernel_size, scale):
    """Neighbourhood attention of (B, H, W, heads, d), by gathering the K*K keys of each query."""
    h, w = q.shape[1:3]
    half = kernel_size // 2
    rows = (torch.arange(h) - half).clamp(0, h - kernel_size)[:, None] + torch.arange(kernel_size)
    columns = (torch.arange(w) - half).clamp(0, w - kernel_size)[:, None] + torch.arange(kernel_size)
    keys, values = (
        u[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3, 4) for u in (k, v)
    )  # (B, H, W, K*K, heads, d)
    scores = torch.einsum("bhwnd,bhwknd->bhwnk", q, keys) * scale
    return torch.einsum("bhwnk,bhwknd->bhwnd", scores.softmax(-1), values)


@pytest.fixture(scope="module")
def k_diffusion():
    checkout = os.environ.get("LEDIFLOW_K_DIFFUSION")
    if not checkout:
        pytest.skip("LEDIFLOW_K_DIFFUSION does not name a checkout of k-diffusion")
    for package in ("einops", "dctorch"):
        pytest.importorskip(package, reason="benchmarks/requirements-peers.txt is not installed")
    spec = importlib.util.spec_from_file_location("peers", ROOT / "benchmarks" / "peers.py")
    peers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peers)
    module = peers.import_k_diffusion(checkout)
    module.natten = types.SimpleNamespace(
        has_fused_na=lambda: True, functional=types.SimpleNamespace(na2d=windows)
    )
    yield types.SimpleNamespace(module=module, build=peers.k_diffusion_model)
    for name in [n for n in sys.modules if n.split(".")[0] == "k_diffusion"]:
        del sys.modules[name]


def shaken(model):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.rand(p.shape, generator=g) - 0.5
            p.add_(0.3 * noise if p.ndim < 2 else 0.2 * noise)
    return model.eval()


@pytest.mark.parametrize("local", [True, False])
def test_same_weights_same_output(k_diffusion, local):
    k = k_diffusion.module
    first = k.NeighborhoodAttentionSpec(16, 7) if local else k.GlobalAttentionSpec(16)
    theirs = shaken(k_diffusion.build(k, first, SIZES))
    ours = VelocityTransformer(**SIZES, global_levels=1 if local else 3, time_bias=True)
    ours.load_state_dict(convert_weights(theirs.state_dict()))
    x, sigma = torch.randn(2, 3, *SIZES["sample_size"]), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        expected = theirs(x, sigma)
        result = ours(x, sigma.log() / 4)
    assert expected.std() > 0.1
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_same_optimiser_groups(k_diffusion):
    k = k_diffusion.module
    theirs = k_diffusion.build(k, k.NeighborhoodAttentionSpec(16, 7), SIZES)
    ours = VelocityTransformer(**SIZES)

    def sizes(groups):
        return sorted(
            (g["lr"], g.get("weight_decay", 1.0) > 0, sum(p.numel() for p in g["params"])) for g in groups
        )

    unused = theirs.aug_in_proj.weight.numel()
    expected = [(lr, decays, n) for lr, decays, n in sizes(theirs.param_groups(3e-4))]
    result = sizes(ours.parameter_groups(3e-4, 0.01))
    assert [g[:2] for g in result] == [g[:2] for g in expected]
    assert sum(g[2] for g in result) == sum(g[2] for g in expected) - unused


# What is kept of k-diffusion, for machines without it

GOLDEN = ROOT / "tests" / "golden" / "k-diffusion.safetensors"


def kept(path=GOLDEN):
    """A slim checkpoint with weights of few digits, and what k-diffusion made of x and sigma with them."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    x, sigma, out = (tensors.pop(f"golden.{name}").float() for name in ("x", "sigma", "out"))
    return tensors, metadata, x, sigma, out


def test_kept_weights_of_k_diffusion_give_what_it_made_of_them(tmp_path):
    tensors, metadata, x, sigma, expected = kept()
    save_file(tensors, tmp_path / "slim.safetensors", metadata)
    ours = load_k_diffusion(tmp_path / "slim.safetensors")
    scale = expected.abs().max().item()
    with torch.no_grad():
        torch.testing.assert_close(ours(x, sigma.log() / 4), expected, rtol=0, atol=1e-5 * scale)
        assert (ours(x, sigma.log()) - expected).abs().max() > 0.01 * scale, "the time is seen"
    assert ours.config.kernel_size == 7 and min(ours.config.sample_size) // 2 > 7, "there are neighbourhoods"


def test_what_is_kept_is_k_diffusions(k_diffusion):
    k = k_diffusion.module
    tensors, metadata, x, sigma, expected = kept()
    model = json.loads(metadata["config"])["model"]
    sizes = {name: model[name] for name in ("widths", "depths", "mapping_width", "mapping_depth")}
    sizes |= {"in_channels": 1, "patch_size": 2, "d_head": 16}
    theirs = k_diffusion.build(k, k.NeighborhoodAttentionSpec(16, 7), sizes).eval()
    theirs.load_state_dict({name.removeprefix("inner_model."): t.float() for name, t in tensors.items()})
    with torch.no_grad():
        torch.testing.assert_close(theirs(x, sigma), expected, rtol=0, atol=1e-6)


# Files


def slim_checkpoint(path, classes=0, **changes):
    """A file as k-diffusion's convert_for_inference.py writes it, with weights of our own under its names."""
    model = {
        "type": "image_transformer_v2",
        "input_channels": 3,
        "input_size": [32, 48],
        "patch_size": [2, 2],
        "depths": [2, 1],
        "widths": [32, 64],
        "self_attns": [
            {"type": "neighborhood", "d_head": 16, "kernel_size": 3},
            {"type": "global", "d_head": 16},
        ],
        "mapping_width": 48,
        **changes,
    }
    sizes = {**SIZES, "widths": (32, 64), "depths": (2, 1), "kernel_size": 3}
    label = {"embedder": "class", "classes": classes}
    ours = shaken(
        VelocityTransformer(**sizes, time_bias=True, conditions={"label": label} if classes else None)
    )
    state = {}
    for name, tensor in ours.state_dict().items():
        for new, old in (
            ("hourglass.lerps.0.factor", "splits.0.fac"),
            ("hourglass.middle.", "mid_level."),
            ("hourglass.down.", "down_levels."),
            ("hourglass.up.", "up_levels."),
            ("hourglass.", ""),
            ("attention_norm.", "self_attn.norm."),
            ("attention.qkv.", "self_attn.qkv_proj."),
            ("attention.out.", "self_attn.out_proj."),
            ("attention.scale", "self_attn.scale"),
            ("feed_forward_norm.", "ff.norm."),
            ("feed_forward.up.", "ff.up_proj."),
            ("feed_forward.down.", "ff.down_proj."),
            ("mapping.norms.0.", "mapping.blocks.0.norm."),
            ("mapping.norms.1.", "mapping.blocks.1.norm."),
        ):
            name = name.replace(new, old)
        if name.startswith("mapping.blocks"):
            name = name.replace(".up.", ".up_proj.").replace(".down.", ".down_proj.")
        name = {
            "patch_in.weight": "patch_in.proj.weight",
            "time_in.weight": "time_in_proj.weight",
            "embedders.label.embedding.weight": "class_emb.weight",
        }.get(name, name)
        state[f"inner_model.{name}"] = tensor.contiguous()
    state["inner_model.time_emb.weight"] = state.pop("inner_model.time_features.frequencies")[
        :, None
    ].contiguous()
    bias = state.pop("inner_model.time_in.bias")
    aug = torch.zeros(48, 48)
    aug[:, 0] = bias  # the cosine of nothing is 1
    state["inner_model.aug_in_proj.weight"] = aug
    state["inner_model.aug_emb.weight"] = torch.randn(24, 9)
    save_file(state, path, metadata={"config": json.dumps({"model": model})})
    return ours


@pytest.mark.parametrize("classes", [0, 3])
def test_a_slim_checkpoint_comes_back_as_a_network(tmp_path, classes):
    ours = slim_checkpoint(tmp_path / "slim.safetensors", classes)
    loaded = load_k_diffusion(tmp_path / "slim.safetensors")
    assert loaded.classes() == classes
    x, t = torch.randn(2, 3, 32, 48), torch.rand(2)
    told = Conditions(label=torch.tensor([0, 2])) if classes else Conditions()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, t, told), ours(x, t, told))
        if classes:
            none = told.drop("label")
            torch.testing.assert_close(loaded(x, t, none), ours(x, t, none))
    loaded.save_pretrained(tmp_path / "network")
    assert (tmp_path / "network" / "config.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "image_v1"}, "a model of type 'image_v1'"),
        ({"self_attns": [{"type": "shifted-window", "d_head": 16, "window_size": 8}] * 2}, "shifted-window"),
        ({"patch_size": [4, 2]}, "patch"),
        ({"d_ffs": [100, 100]}, "d_ff"),
    ],
)
def test_what_has_no_counterpart_is_named(tmp_path, changes, message):
    slim_checkpoint(tmp_path / "slim.safetensors", **changes)
    with pytest.raises(UserError, match=message):
        load_k_diffusion(tmp_path / "slim.safetensors")


def test_a_pickle_is_never_opened(tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "model.pth")
    with pytest.raises(UserError, match="convert_for_inference"):
        load_k_diffusion(tmp_path / "model.pth")
