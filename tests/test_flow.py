"""The path and the losses against closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lediflow import flow


def test_path_ends_and_its_derivative():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 3, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
    assert torch.equal(flow.phi(x, y, torch.zeros(4)), x)
    assert torch.equal(flow.phi(x, y, torch.ones(4)), y)
    t = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    step = 1e-6
    slope = (flow.phi(x, y, t + step) - flow.phi(x, y, t - step)) / (2 * step)
    torch.testing.assert_close(slope, flow.velocity(x, y), rtol=1e-7, atol=1e-7)


def test_losses_by_hand():
    x, y = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]]])
    v = torch.tensor([[[[0.0, 1.0]]]])  # errors 1 and 2
    assert flow.matching_loss(v, x, y).item() == pytest.approx((1 + 4) / 2)
    sigma = torch.tensor([[[[0.5, 1e-6]]]])  # weights 2 and 1 / max(1e-6, 1e-3) = 1000
    assert flow.weighted_matching_loss(v, x, y, sigma).item() == pytest.approx((1 * 2 + 4 * 1000) / 2)


def test_loss_gradients_in_float64():
    g = torch.Generator().manual_seed(0)
    v, x, y = (torch.randn(2, 1, 2, 2, generator=g, dtype=torch.float64) for _ in range(3))
    sigma = torch.rand(2, 1, 2, 2, generator=g, dtype=torch.float64) + 0.1
    v.requires_grad_()
    assert torch.autograd.gradcheck(lambda u: flow.weighted_matching_loss(u, x, y, sigma), (v,))
    assert torch.autograd.gradcheck(lambda u: flow.matching_loss(u, x, y), (v,))


def test_the_minimiser_is_the_conditional_mean():
    """Eq. 2 is least at E[y - x | phi_t]; for independent Gaussians that is linear and known."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 1, generator=g, dtype=torch.float64)
    y = 2 + 0.5 * torch.randn(200_000, 1, generator=g, dtype=torch.float64)
    t = torch.full((len(x),), 0.3, dtype=torch.float64)
    point = flow.phi(x, y, t)
    design = torch.cat((point, torch.ones_like(point)), dim=1)
    fitted = torch.linalg.lstsq(design, flow.velocity(x, y)).solution
    variance = 0.7**2 + 0.3**2 * 0.25
    slope = (0.3 * 0.25 - 0.7) / variance
    assert fitted[0].item() == pytest.approx(slope, abs=0.01)
    assert fitted[1].item() == pytest.approx(2 - slope * 0.3 * 2, abs=0.01)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_stratified_t_has_one_in_each_stratum(n, seed):
    t = flow.stratified_t(n, torch.Generator().manual_seed(seed))
    assert t.shape == (n,)
    assert (t >= 0).all()
    assert (t < 1).all()
    stratum = (t.double() * n + 1e-4).floor().clamp_max(n - 1)  # float32 rounding at the borders
    assert len(stratum.unique()) >= n - 1


def test_each_t_alone_is_uniform():
    g = torch.Generator().manual_seed(0)
    first = torch.stack([flow.stratified_t(8, g)[0] for _ in range(4000)])
    assert first.mean().item() == pytest.approx(0.5, abs=0.02)
    assert first.std().item() == pytest.approx(12**-0.5, abs=0.02)
