"""The parts of HDiT against their definitions."""

import math

import pytest
import torch
from torch.nn import functional as F

from lediflow.errors import UserError
from lediflow.networks import hourglass as hg
from lediflow.networks import positions


def test_rms_norm_plain_and_adaptive():
    x = torch.randn(2, 3, 3, 8, generator=torch.Generator().manual_seed(0))
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(hg.RMSNorm(8)(x), expected)
    norm = hg.RMSNorm(8, cond_width=4)
    cond = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(norm(x, cond), expected, msg="adaptive scales must start at 1")
    torch.nn.init.normal_(norm.linear.weight)
    scale = 1 + cond @ norm.linear.weight.T
    torch.testing.assert_close(norm(x, cond), expected * scale[:, None, None])


def test_rms_norm_statistics_are_fp32():
    """In bf16 the sum of squares of 512 values would be off by percents."""
    x = torch.full((1, 512), 3.0, dtype=torch.bfloat16)
    torch.testing.assert_close(hg.RMSNorm(512)(x).float(), torch.ones(1, 512))


def test_geglu_is_a_times_gelu_of_gate():
    layer = hg.GEGLU(4, 6)
    torch.nn.init.normal_(layer.down.weight)
    x = torch.randn(5, 4)
    a, gate = (x @ layer.up.weight.T).split(6, dim=-1)
    torch.testing.assert_close(layer(x), (a * F.gelu(gate)) @ layer.down.weight.T)


def test_positions_are_cell_centres_and_pool_to_the_coarser_grid():
    p = positions.axial_positions((4, 8))
    assert p[0, 0].tolist() == pytest.approx([-0.375, -0.875])
    assert p[-1, -1].tolist() == pytest.approx([0.375, 0.875])
    pooled = p.view(2, 2, 4, 2, 2).mean((1, 3))
    torch.testing.assert_close(pooled, positions.axial_positions((2, 4)))


def test_rope_frequencies_and_rotation():
    cos, sin = positions.rope_table((1, 2), 2, 16, torch.device("cpu"), torch.float64)
    assert cos.shape == (2, 2, 4)
    # x positions are -0.5 and 0.5; frequencies log-spaced from pi to 10 pi over 2 heads x 2, interleaved
    frequencies = [math.pi * 10 ** (i / 4) for i in range(4)]
    angle = 0.5 * torch.tensor([[frequencies[0], frequencies[2]], [frequencies[1], frequencies[3]]])
    box = 0.0  # a single row lies at height 0
    torch.testing.assert_close(sin[1, :, 2:].float(), angle.sin(), rtol=1e-5, atol=1e-5)
    assert (sin[1, :, :2] == box).all()

    x = torch.randn(1, 2, 2, 16, dtype=torch.float64)
    y = positions.rotate(x, cos, sin)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[..., 8:], x[..., 8:]), "the second half of a head does not turn"


def test_attention_depends_on_relative_position_only():
    """Rotary embeddings: shifting all positions along an axis leaves q.k as it was."""
    x = torch.randn(1, 1, 1, 16, dtype=torch.float64).expand(1, 6, 1, 16)
    cos, sin = positions.rope_table((1, 6), 1, 16, torch.device("cpu"), torch.float64)
    r = positions.rotate(x, cos, sin)[0, :, 0]
    gram = r @ r.T
    for offset in range(1, 6):
        torch.testing.assert_close(gram.diagonal(offset), gram.diagonal(offset)[:1].expand(6 - offset))


def test_cosine_attention_ignores_the_length_of_q_and_k():
    layer = hg.SelfAttention(16, 8, None).double()
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(1, 3, 3, 16, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.qkv.weight[:32] *= 7.0
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)


def test_merge_then_split_is_the_identity_with_identity_weights():
    x = torch.randn(2, 4, 6, 3)
    merge, split = hg.TokenMerge(3, 12), hg.TokenSplit(12, 3)
    for layer in (merge, split):
        torch.nn.init.eye_(layer.proj.weight)
    torch.testing.assert_close(split(merge(x)), x)
    assert torch.equal(hg.patchify(x, 2)[0, 0, 0], x[0, :2, :2].flatten()), "K: (nh nw e)"


def test_a_fresh_hourglass_passes_tokens_through_its_merges_only():
    """All blocks start as the identity, so what is left is lerp(skip, split(merge(x)), 0.5)."""
    net = hg.Hourglass((16, 24), (2, 2), ff_factor=2, d_head=8, cond_width=8, kernel_size=3)
    x, cond = torch.randn(1, 4, 4, 16), torch.randn(1, 8)
    torch.testing.assert_close(net(x, cond), (x + net.splits[0](net.merges[0](x))) / 2)


def test_local_above_and_global_below():
    assert hg.level_kernels(3, 7, 1) == [7, 7, None]
    assert hg.level_kernels(2, 5, 2) == [None, None]


def test_parameter_groups_follow_hdit():
    from lediflow.networks.velocity import VelocityTransformer

    net = VelocityTransformer(
        8,
        1,
        2,
        (16,),
        (1,),
        d_head=8,
        mapping_width=16,
        mapping_depth=1,
        conditions={"label": {"embedder": "class", "classes": 3}},
    )
    groups = net.parameter_groups(lr=3e-4, weight_decay=0.1)
    where = {id(p): g for g in groups for p in g["params"]}
    assert len(where) == len(list(net.parameters()))
    block = net.hourglass.middle[0]
    assert (
        where[id(block.attention.qkv.weight)]["lr"],
        where[id(block.attention.qkv.weight)]["weight_decay"],
    ) == (
        3e-4,
        0.1,
    )
    assert where[id(block.attention_norm.linear.weight)]["lr"] == pytest.approx(1e-4)
    assert where[id(net.mapping.blocks[0].up.weight)]["lr"] == pytest.approx(1e-4)
    assert where[id(block.attention.scale)]["weight_decay"] == 0
    assert where[id(net.embedders["label"].embedding.weight)]["weight_decay"] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hg.token_grid(30, 4, 1, "flow"), r"flow: size 30x30 is not divisible by 8.*nearest.*32x32"),
        (lambda: hg.check_widths((48,), (2,), 32, 7, "flow"), "width 48 is not divisible by d_head 32"),
        (lambda: hg.check_widths((48,), (2,), 12, 7, "flow"), "d_head must be divisible by 8"),
        (lambda: hg.check_widths((64,), (2,), 32, 6, "flow"), "kernel_size must be odd, not 6"),
        (lambda: hg.check_widths((64, 64), (2,), 32, 7, "flow"), "one width for each depth"),
    ],
)
def test_bad_sizes_are_refused_by_name(call, message):
    with pytest.raises(UserError, match=message):
        call()
