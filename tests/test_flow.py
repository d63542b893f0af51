"""The path and the losses against closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lediflow import flow, ode


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


def test_descent_on_the_loss_ends_at_the_conditional_mean():
    """Eq. 2 is least at E[y - x | phi_t]; for independent Gaussians that is linear and known."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, generator=g, dtype=torch.float64)
    y = 2 + 0.5 * torch.randn(20_000, 1, generator=g, dtype=torch.float64)
    t = torch.full((len(x),), 0.3, dtype=torch.float64)
    point = flow.phi(x, y, t)
    slope, offset = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    descent = torch.optim.LBFGS([slope, offset], max_iter=50)

    def closure():
        descent.zero_grad()
        loss = flow.matching_loss(slope * point + offset, x, y)
        loss.backward()
        return loss

    descent.step(closure)
    variance = 0.7**2 + 0.3**2 * 0.25
    expected = (0.3 * 0.25 - 0.7) / variance
    assert slope.item() == pytest.approx(expected, abs=0.02)
    assert offset.item() == pytest.approx(2 - expected * 0.3 * 2, abs=0.02)


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


def test_logit_normal_t_has_a_normal_logit():
    t = flow.logit_normal(flow.stratified_t(10_000, torch.Generator().manual_seed(0)).double())
    assert ((t > 0) & (t < 1)).all()
    ordered = t.logit().sort().values
    expected = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(10_000).double() + 0.5) / 10_000)
    inner = slice(100, -100)
    torch.testing.assert_close(ordered[inner], expected[inner], atol=0.01, rtol=0.0)


# Average velocity, on the flow from N(0, 1) to N(M, S^2): x_t = t M + sigma_t x_0 in closed form

M, S = 1.5, 0.4


def sigma(t):
    return ((1 - t) ** 2 + t**2 * S**2).sqrt()


def gaussian_velocity(x, t):
    return M + (t * S**2 - (1 - t)) / sigma(t) ** 2 * (x - t * M)


def gaussian_average_velocity(x, t, r):
    """(x_r - x_t) / (r - t), and v where r = t."""
    mean = (r * M + sigma(r) / sigma(t) * (x - t * M) - x) / torch.where(r > t, r - t, torch.ones_like(r))
    return torch.where(r > t, mean, gaussian_velocity(x, t))


@pytest.fixture
def intervals():
    g = torch.Generator().manual_seed(0)
    times = torch.rand(2, 64, generator=g, dtype=torch.float64).sort(0).values
    x = 2 * torch.randn(64, generator=g, dtype=torch.float64)
    return x, times[0], times[1]


def test_the_closed_form_satisfies_the_identity_and_the_other_sign_does_not(intervals):
    x, t, r = intervals
    v = gaussian_velocity(x, t)
    correction = flow.average_velocity_correction(lambda x, t: gaussian_average_velocity(x, t, r), x, v, t, r)
    u = gaussian_average_velocity(x, t, r)
    assert (v + correction - u).abs().max() < 1e-12
    assert (v - correction - u).abs().max() > 0.1


def test_there_is_no_correction_where_r_is_t(intervals):
    x, t, _ = intervals
    v = gaussian_velocity(x, t)
    correction = flow.average_velocity_correction(lambda x, t: x**2 * t, x, v, t, t)
    assert torch.equal(correction, torch.zeros_like(x))


def test_steps_of_an_exact_average_velocity_are_exact():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for steps in (1, 2, 5):
        solution = ode.integrate(
            lambda t, state, r: gaussian_average_velocity(state, t, r), x, steps=steps, solver="mean"
        )
        torch.testing.assert_close(solution.end, M + S * x, rtol=1e-12, atol=1e-12)
        assert solution.nfe == steps


def test_the_adaptive_loss_has_the_gradient_of_a_constant_weight():
    errors = torch.tensor([0.5, 2.0], requires_grad=True)
    loss = flow.adaptive_loss(errors, 0.75)
    loss.backward()
    weights = (torch.tensor([0.5, 2.0]) + 1e-3) ** -0.75
    torch.testing.assert_close(errors.grad, weights / 2)
    torch.testing.assert_close(loss.detach(), (weights * errors.detach()).mean())
    torch.testing.assert_close(flow.adaptive_loss(errors, 0.0), errors.mean())


@pytest.mark.parametrize("batch", [64, 256])
def test_intervals_have_the_shares_that_were_asked_for(batch):
    g = torch.Generator().manual_seed(0)
    times, others = torch.rand(2, batch, generator=g)
    t, r, moving = flow.draw_intervals(times, others, range(batch), equal_share=0.5, end_share=0.25)
    assert (t <= r).all()
    still = sorted(set(range(batch)) - set(moving))
    assert torch.equal(t[still], r[still])
    assert torch.equal(t[still], times[still]), "the velocity is learned at the times that were drawn"
    assert len(moving) == pytest.approx(batch / 2, abs=2)
    assert (r == 1).sum().item() == pytest.approx(batch / 4, abs=2)
    # a part of the batch has what the whole gives it
    part = flow.draw_intervals(times[8:20], others[8:20], range(8, 20), equal_share=0.5, end_share=0.25)
    assert torch.equal(part[0], t[8:20])
    assert torch.equal(part[1], r[8:20])
    assert part[2] == [i - 8 for i in moving if 8 <= i < 20]
