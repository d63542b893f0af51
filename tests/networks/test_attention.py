"""Neighbourhood attention against a literal loop, and its two computations against each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lediflow.networks import attention


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
    assert len(calls[0][0][0, 0]) == 4 * 5, "tiles of 8, one that overhangs at each border"
    torch.testing.assert_close(result, literal(q, k, v, grid, 7))


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


def test_mask_made_in_inference_mode_serves_training():
    attention.neighborhood_mask.cache_clear()
    q, k, v = qkv((5, 5))
    with torch.inference_mode():
        attention.self_attention(q, k, v, (5, 5), 3)
    q.requires_grad_()
    attention.self_attention(q, k, v, (5, 5), 3).sum().backward()
    assert q.grad.isfinite().all()
