"""Neighbourhood attention against a literal loop, and its backends against each other."""

import importlib.machinery
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lediflow.errors import UserError
from lediflow.networks import attention
from lediflow.networks.velocity import VelocityTransformer


def literal(q, k, v, grid, kernel):
    """NATTEN's definition, one query at a time."""
    h, w = grid
    out = torch.zeros_like(v)
    for i in range(h):
        for j in range(w):
            top = min(max(i - kernel // 2, 0), h - kernel)
            left = min(max(j - kernel // 2, 0), w - kernel)
            keys = [a * w + b for a in range(top, top + kernel) for b in range(left, left + kernel)]
            scores = (q[:, :, i * w + j, None] * k[:, :, keys]).sum(-1)
            out[:, :, i * w + j] = (scores.softmax(-1)[..., None] * v[:, :, keys]).sum(-2)
    return out


def qkv(grid, heads=2, d=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(3, 2, heads, grid[0] * grid[1], d, generator=g, dtype=torch.float64).to(dtype).unbind(0)
    )


@settings(max_examples=20, deadline=None)
@given(h=st.integers(3, 9), w=st.integers(3, 9), kernel=st.sampled_from([3, 5]), seed=st.integers(0, 1000))
def test_equals_the_definition(h, w, kernel, seed):
    if min(h, w) < kernel:
        return
    q, k, v = qkv((h, w), seed=seed)
    torch.testing.assert_close(
        attention.self_attention(q, k, v, (h, w), kernel), literal(q, k, v, (h, w), kernel)
    )


@settings(max_examples=30, deadline=None)
@given(
    h=st.integers(3, 13),
    w=st.integers(3, 13),
    kernel=st.sampled_from([3, 5, 7]),
    tile=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_tiles_equal_the_mask_forward_and_backward(h, w, kernel, tile, seed):
    """Also where tiles overhang the grid, and where they reach over all of it."""
    if min(h, w) < kernel:
        return
    dense, tiled = ([u.detach().requires_grad_() for u in qkv((h, w), seed=seed)] for _ in range(2))
    mask = attention.neighborhood_mask((h, w), kernel, torch.device("cpu"))
    expected = attention._attend(*dense, mask)
    result = attention.tiled_attention(*tiled, (h, w), kernel, tile)
    torch.testing.assert_close(result, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (expected * weights).sum().backward()
    (result * weights).sum().backward()
    for a, b in zip(tiled, dense, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_large_grids_are_tiled_and_still_the_definition(monkeypatch):
    grid = (28, 37)
    q, k, v = qkv(grid, heads=1, d=4)
    calls = []
    monkeypatch.setattr(attention, "_attend", lambda *a, real=attention._attend: calls.append(a) or real(*a))
    result = attention.self_attention(q, k, v, grid, 7)
    assert len(calls[0][0][0]) == 4 * 5, "tiles of 8, one that overhangs at each border"
    torch.testing.assert_close(result, literal(q, k, v, grid, 7))


def test_work_in_parts_that_fit_in_a_cache_gives_the_same():
    q, k, v = (u.repeat(3, 4, 1, 1) for u in qkv((33, 40), heads=4, d=4, dtype=torch.float32))
    whole = attention.tiled_attention(*(u.requires_grad_() for u in (q, k, v)), (33, 40), 7)
    assert attention._parts(6 * 16 * 25 * 64 * 196, q.device) == 1, "where gradients are wanted"
    with torch.no_grad():
        assert attention._parts(6 * 16 * 25 * 64 * 196, q.device) == 14
        torch.testing.assert_close(attention.tiled_attention(q, k, v, (33, 40), 7), whole)


def test_every_query_has_k_squared_keys():
    mask = attention.neighborhood_mask((9, 12), 7, torch.device("cpu"))
    assert (mask.sum(-1) == 49).all()


@pytest.mark.parametrize("grid", [(4, 4), (2, 12), (7, 7)])
def test_global_where_a_side_is_not_longer_than_the_kernel(grid):
    q, k, v = qkv(grid)
    torch.testing.assert_close(
        attention.self_attention(q, k, v, grid, 7), attention.self_attention(q, k, v, grid, None)
    )


@pytest.mark.parametrize("kernel", [None, 3])
@pytest.mark.parametrize("grid", [(4, 5), (9, 7)])
def test_explicit_bf16_training_path_agrees_with_sdpa(kernel, grid):
    """Training on the CPU in bf16 takes another computation; values and gradients must be the same."""
    exact = [u.requires_grad_() for u in qkv(grid)]
    rounded = [u.detach().bfloat16().requires_grad_() for u in exact]
    reference = attention.self_attention(*exact, grid, kernel)
    assert attention._explicit_is_faster(rounded[0], rounded[1])
    result = attention.self_attention(*rounded, grid, kernel)
    torch.testing.assert_close(result.double(), reference, rtol=0.05, atol=0.05)
    reference.square().sum().backward()
    result.square().sum().backward()
    for a, b in zip(rounded, exact, strict=True):
        assert (a.grad.double() - b.grad).norm() / b.grad.norm() < 0.03


def test_gradient_in_float64():
    q, k, v = (u[:1, :1].detach().requires_grad_() for u in qkv((4, 3), d=4))
    assert torch.autograd.gradcheck(lambda *u: attention.self_attention(*u, (4, 3), 3), (q, k, v))


def test_what_inference_mode_made_serves_training():
    grid = (35, 31)  # no other test's, so the tables are made here
    q, k, v = qkv(grid, heads=1, d=4)
    with torch.inference_mode():
        attention.self_attention(q, k, v, grid, 3)
    q.requires_grad_()
    attention.self_attention(q, k, v, grid, 3).sum().backward()
    assert q.grad.isfinite().all()


# Backends


def natten_stand_in(calls):
    """A module with NATTEN's `na2d`: (B, H, W, heads, d), softmax of the scaled scores of each window."""

    def na2d(q, k, v, kernel_size, scale=None):
        calls.append(kernel_size)
        grid = q.shape[1:3]
        q, k, v = (u.flatten(1, 2).transpose(1, 2) for u in (q * scale, k, v))
        return literal(q, k, v, grid, kernel_size).transpose(1, 2).unflatten(1, grid)

    module = types.ModuleType("natten")
    module.na2d = na2d
    module.__spec__ = importlib.machinery.ModuleSpec("natten", None)
    return module


@pytest.fixture
def natten(monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "natten", natten_stand_in(calls))
    monkeypatch.setattr(attention, "missing_package", lambda name: None)
    return calls


@settings(max_examples=25, deadline=None)
@given(
    h=st.integers(5, 40),
    w=st.integers(5, 40),
    kernel=st.sampled_from([3, 5]),
    heads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_dense_and_tiles_agree_forward_and_backward(h, w, kernel, heads, dtype, seed):
    exact = qkv((h, w), heads=heads, seed=seed)
    results = {}
    for backend, kind in (("dense", torch.float64), ("dense", dtype), ("tiles", dtype)):
        u = [x.detach().to(kind).requires_grad_() for x in exact]
        y = attention.self_attention(*u, (h, w), kernel, backend)
        y.double().square().sum().backward()
        results[backend, kind] = [y.detach().double(), *(x.grad.double() for x in u)]
    reference = results["dense", torch.float64]
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    for key in (("dense", dtype), ("tiles", dtype)):
        for a, b in zip(results[key], reference, strict=True):
            assert (a - b).norm() <= tolerance * b.norm(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(11, 17), (32, 32)])
def test_flex_agrees_with_dense_in_inference(grid, dtype):
    q, k, v = qkv(grid, d=16, dtype=dtype)
    with torch.no_grad():
        flex = attention.self_attention(q, k, v, grid, 7, "flex")
        dense = attention.self_attention(q, k, v, grid, 7, "dense")
    assert (flex - dense).norm() < (1e-5 if dtype is torch.float32 else 0.02) * dense.norm()


def test_natten_is_called_in_its_layout(natten):
    q, k, v = qkv((6, 9))
    result = attention.self_attention(q, k, v, (6, 9), 5, "natten")
    torch.testing.assert_close(result, literal(q, k, v, (6, 9), 5))
    assert natten == [5]


@pytest.mark.parametrize(
    ("grid", "device", "there", "expected"),
    [
        ((16, 16), "cpu", (), "dense"),
        ((32, 32), "cpu", (), "tiles"),
        ((32, 32), "cuda", (), "tiles"),
        ((32, 32), "cuda", ("flex",), "flex"),
        ((32, 32), "cuda", ("flex", "natten"), "natten"),
        ((16, 16), "cuda", ("flex", "natten"), "dense"),
    ],
)
def test_automatic_choice(monkeypatch, grid, device, there, expected):
    monkeypatch.setattr(attention, "missing_package", lambda name: None if name in there else name)
    assert attention.best_backend(grid, torch.device(device)) == expected


def test_environment_variable_forces_a_backend(monkeypatch, natten):
    monkeypatch.setenv("LEDIFLOW_ATTENTION", "natten")
    q, k, v = qkv((6, 9))
    attention.self_attention(q, k, v, (6, 9), 3)
    assert natten == [3]
    attention.self_attention(q, k, v, (6, 9), 3, "dense")
    assert natten == [3], "the argument wins"


def test_a_backend_that_is_not_there_is_refused_when_a_network_is_built(monkeypatch):
    monkeypatch.setattr(attention, "missing_package", lambda name: "natten" if name == "natten" else None)
    monkeypatch.setenv("LEDIFLOW_ATTENTION", "natten")
    with pytest.raises(UserError, match=r"pip install natten>=0\.21"):
        VelocityTransformer(8, 3, 2, (16,), (1,), d_head=8, mapping_width=16)
    monkeypatch.setenv("LEDIFLOW_ATTENTION", "tile")
    with pytest.raises(UserError, match="did you mean 'tiles'"):
        VelocityTransformer(8, 3, 2, (16,), (1,), d_head=8, mapping_width=16)


def test_flex_says_where_it_cannot_train():
    q, k, v = (u.requires_grad_() for u in qkv((8, 8), dtype=torch.float32))
    with pytest.raises(UserError, match="no backward on the CPU"):
        attention.self_attention(q, k, v, (8, 8), 3, "flex")
