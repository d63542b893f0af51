"""The integrator against closed forms: known flows, orders of convergence, direction, counts."""

import math

import pytest
import torch

from lediflow import ode
from lediflow.errors import UserError

FIXED = [name for name, n in ode.EVALUATIONS_PER_STEP.items() if n is not None]


def gaussian_field(t, state, *, m=1.5, s=0.4):
    """Velocity of the flow between N(0, 1) and N(m, s^2), independent coupling, closed form."""
    mean, variance = t * m, (1 - t) ** 2 + t**2 * s**2
    return m + (t * s**2 - (1 - t)) / variance * (state - mean)


def exact_gaussian_end(x, m=1.5, s=0.4):
    return m + s * x


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("solver", ["rk4", "heun3", "dopri5"])
def test_gaussian_to_gaussian(solver, x):
    end = ode.integrate(gaussian_field, x, steps=64, solver=solver, rtol=1e-9, atol=1e-9).end
    torch.testing.assert_close(end, exact_gaussian_end(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)]
)
def test_order_of_convergence(solver, order):
    """y' = -(1 + t) y^2 has the solution 1 / (1/y0 + t + t^2/2); not affine, so no order is lucky."""
    y0 = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)

    def error(steps):
        end = ode.integrate(lambda t, y: -(1 + t) * y.square(), y0, steps=steps, solver=solver).end
        return (end - 1 / (1 / y0 + 1.5)).abs().max().item()

    assert math.log2(error(64) / error(128)) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_step_count_means_steps_and_evaluations_are_counted(solver, steps, x):
    calls = []

    def field(t, state, _r=None):
        calls.append(float(t))
        return torch.ones_like(state)

    solution = ode.integrate(field, x, steps=steps, solver=solver)
    assert solution.nfe == len(calls) == steps * ode.EVALUATIONS_PER_STEP[solver]
    assert len(solution.times) == steps + 1
    torch.testing.assert_close(solution.end, x + 1)
    assert all(0 <= t <= 1 for t in calls)


def test_adaptive_solver_counts_what_it_used(x):
    calls = []

    def field(t, state):
        calls.append(t)
        return gaussian_field(t, state)

    assert ode.integrate(field, x, solver="dopri5", steps=1).nfe == len(calls) > 6


@pytest.mark.parametrize("solver", ["midpoint", "heun2", "heun3", "rk4", "dopri5"])
def test_reverse_undoes_forward(solver, x):
    there = ode.integrate(gaussian_field, x, steps=128, solver=solver, rtol=1e-8, atol=1e-8).end
    back = ode.integrate(gaussian_field, there, steps=128, solver=solver, reverse=True, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(back.end, x, rtol=2e-4, atol=2e-4)
    assert back.times[0] == 1
    assert back.times[-1] == 0


def test_trajectory_only_on_demand(x):
    assert ode.integrate(gaussian_field, x, steps=4).trajectory is None
    solution = ode.integrate(gaussian_field, x, steps=4, trajectory=True)
    assert solution.trajectory.shape == (5, *x.shape)
    assert torch.equal(solution.trajectory[0], x)
    assert torch.equal(solution.trajectory[-1], solution.end)


def test_float32_states_stay_float32():
    end = ode.integrate(gaussian_field, torch.zeros(3), steps=2, solver="dopri5").end
    assert end.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "midpiont"}, "did you mean 'midpoint'"),
        ({"steps": 0}, "at least 1, not 0"),
        ({"steps": -3}, "at least 1"),
    ],
)
def test_bad_input(options, message, x):
    with pytest.raises(UserError, match=message):
        ode.integrate(gaussian_field, x, **options)


def test_mean_does_not_go_back():
    with pytest.raises(UserError, match="only goes from the source"):
        ode.integrate(lambda t, x, r: x, torch.ones(1), solver="mean", reverse=True)


def test_an_adaptive_solver_makes_an_image_the_same_in_any_company():
    """Each image has steps of its own; the evaluations are the mean over the images."""
    from lediflow.conditions import Conditions
    from lediflow.fields import conditional

    def network(x, t, conditions, r):
        return conditions["z"] * torch.sin(3 * x)

    x, z = torch.linspace(-1, 1, 6).view(6, 1, 1, 1), torch.tensor([0.1, 1, 3, 5, 8, 12.0]).view(6, 1, 1, 1)
    whole = ode.integrate(conditional(network, Conditions(z=z)), x, solver="dopri5", steps=2, trajectory=True)
    alone = [
        ode.integrate(
            conditional(network, Conditions(z=z[i : i + 1])), x[i : i + 1], solver="dopri5", steps=2
        )
        for i in range(6)
    ]
    assert torch.equal(whole.end, torch.cat([one.end for one in alone]))
    assert len({one.nfe for one in alone}) > 1, "some need more steps than others"
    assert whole.nfe == sum(one.nfe for one in alone) / 6
    assert whole.trajectory.shape == (3, 6, 1, 1, 1)
    assert torch.equal(whole.trajectory[-1], whole.end)


def test_times_are_as_fine_as_the_device_has_them():
    from lediflow.devices import finest_float

    assert finest_float(torch.device("cpu")) == torch.float64
    assert finest_float(torch.device("mps")) == torch.float32


@pytest.mark.parametrize("solver", ["rk4", "dopri5", "mean"])
def test_an_interval_may_begin_later(solver):
    """dx/dt = x: from t = b to 1 by e^(1-b); its average velocity is known exactly."""
    times = []

    def field(t, state, r=None):
        times.append(float(t))
        return state if r is None else state * (torch.exp(r - t) - 1) / (r - t)

    start = torch.tensor([[1.0], [2.0]])
    solution = ode.integrate(field, start, steps=4, solver=solver, begin=0.6)
    torch.testing.assert_close(solution.end, start * torch.tensor(0.4).exp(), rtol=1e-5, atol=0)
    assert min(times) >= 0.6 and solution.times[0] == 0.6 and len(solution.times) == 5
    if solver != "mean":
        back = ode.integrate(field, solution.end, steps=4, solver=solver, begin=0.6, reverse=True)
        torch.testing.assert_close(back.end, start, rtol=1e-5, atol=0)
