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
def test_explicit_bf16_training_path_agrees_with_sdpa(kernel):
    """Training on the CPU in bf16 takes another computation; values and gradients must be the same."""
    grid = (6, 5)
    exact = [u.requires_grad_() for u in qkv(grid)]
    rounded = [u.detach().bfloat16().requires_grad_() for u in exact]
    reference = attention.self_attention(*exact, grid, kernel)
    assert attention._explicit_is_faster(rounded[0])
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
