from __future__ import annotations

import math

import pytest
import torch

from lediflow.conditions import Conditions
from lediflow.diagnosis import measurements as m
from lediflow.fields import Field, conditional
from lediflow.gaussian import DiagonalGaussian


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_transport_cost_in_closed_form():
    y = 0.5 * _normal(4000, 1, 2, 2) + torch.tensor([0.3, -0.3]).view(1, 1, 1, 2)
    prior = DiagonalGaussian(y + 0.1, torch.full_like(y, math.log(0.04)))
    found = m.transport(y, prior)
    assert found["learned"] == pytest.approx(0.01 + 0.04, rel=1e-5)
    assert found["gaussian"] == pytest.approx(0.25 + 0.09 + 1, rel=0.03)
    assert found["per_pixel_gaussian"] == pytest.approx(2 * 0.25, rel=0.03)
    # against draws: x from P_L
    assert (y - prior.at(_normal(4000, 1, 2, 2, seed=1))).square().mean().item() == pytest.approx(
        0.05, rel=0.05
    )


@pytest.mark.parametrize(("factor", "one", "two"), [(1.0, 0.683, 0.954), (0.5, 0.383, 0.683)])
def test_calibration_of_a_sigma_that_is_right_and_one_that_is_half(factor, one, two):
    sigma = 0.2 + 0.5 * torch.rand(100, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    y = sigma * _normal(100, 1, 16, 16)
    found = m.calibration(y, DiagonalGaussian(torch.zeros_like(y), 2 * (factor * sigma).log()))
    assert found["residual_std"] == pytest.approx(1 / factor, rel=0.02)
    assert found["within_1_sigma"] == pytest.approx(one, abs=0.01)
    assert found["within_2_sigma"] == pytest.approx(two, abs=0.01)


def test_share_of_sigma_at_the_floor():
    log_var = torch.cat([torch.full((30,), -8.9), torch.full((70,), -4.0)])
    found = m.sigma_floor(DiagonalGaussian(torch.zeros(100), log_var))
    assert found["share_at_floor"] == pytest.approx(0.3)
    assert found["floor"] == pytest.approx(math.exp(-4.5))
    assert found["median"] == pytest.approx(math.exp(-2))


def test_collapsed_channel_is_told_from_a_used_one():
    mean = torch.cat([_normal(500, 1, 2, 2), torch.zeros(500, 1, 2, 2)], 1)
    log_var = torch.cat([torch.full((500, 1, 2, 2), math.log(0.25)), torch.zeros(500, 1, 2, 2)], 1)
    used, empty = m.channels(DiagonalGaussian(mean, log_var))
    assert used["kl"] == pytest.approx(4 * 0.5 * (1 + 0.25 - 1 - math.log(0.25)), rel=0.1)
    assert used["signal"] == pytest.approx(0.8, abs=0.02)
    assert empty == {"kl": 0, "spread": 0, "signal": 0}


def test_gap_is_small_for_the_same_z_and_one_for_noise():
    def latents(seed):  # two clusters: neither mean nor variance tells them from standard normal noise
        sign = torch.where(_normal(300, 1, 1, 1, seed=seed) > 0, 1.0, -1.0)
        return 0.98 * sign + 0.2 * _normal(300, 1, 2, 2, seed=seed + 50)

    sampled = {"sampled": latents(3), "noise_again": _normal(300, 1, 2, 2, seed=9)}
    found = m.latent_gap(latents(1), latents(2), sampled)
    assert found["unseen"]["share"] == 0
    assert found["gaussian"]["share"] == 1
    assert abs(found["sampled"]["share"]) < max(0.1, 2 * found["noise"])
    assert found["noise_again"]["share"] == pytest.approx(1, abs=0.2)
    assert found["sampled"]["density"] == pytest.approx(1, abs=0.3)
    assert found["noise_again"]["density"] < 0.5 < found["sampled"]["coverage"]


def plain(velocity):
    """A field that is the same for all images."""
    return Field(velocity, rows=lambda index: plain(velocity))


GROWING = plain(lambda t, state, r: state)


def test_curvature_of_a_constant_field_is_nothing():
    x = _normal(5, 1, 4, 4)
    found = m.curvature(plain(lambda t, state, r: torch.ones_like(state)), x, batch_size=2)
    assert found["length"] == pytest.approx(m.GREY_LEVELS, rel=1e-5)
    assert found["straightness"] == pytest.approx(0, abs=1e-6)
    assert max(found["error"].values()) == pytest.approx(0, abs=1e-3)


def test_curvature_of_a_growing_field_is_the_closed_form():
    # d phi / dt = phi: phi_1 = e x, the chord is (e - 1) x, and the velocity strays by (e^t - (e - 1)) x
    x = torch.ones(3, 1, 2, 2, dtype=torch.float64)
    found = m.curvature(GROWING, x)
    chord = math.e - 1
    assert found["length"] == pytest.approx(chord * m.GREY_LEVELS, rel=1e-4)
    expected = ((math.e**2 - 1) / 2 - chord**2) / chord**2
    assert found["straightness"] == pytest.approx(expected, rel=0.01)
    assert len(found["profile"]) == m.TIMES
    assert sum(found["profile"]) / m.TIMES == pytest.approx(found["straightness"])
    assert found["error"]["euler_1"] == pytest.approx((math.e - 2) * m.GREY_LEVELS, rel=1e-3)
    assert found["error"]["1"] == pytest.approx((math.e - 2.5) * m.GREY_LEVELS, rel=1e-3)


def test_one_step_of_an_average_velocity_is_measured_from_many_steps():
    # d phi / dt = phi has u(phi, t, r) = phi (e^(r - t) - 1) / (r - t); one that is a tenth too long ends off
    x = torch.ones(5, 1, 2, 2, dtype=torch.float64)

    def off_by(factor):
        def average(t, state, r):
            return factor * state * (torch.exp(r - t) - 1) / (r - t)

        return m.curvature(GROWING, x, average=plain(average), batch_size=2, unit=1.0)["error"]

    assert off_by(1.0)["mean_1"] == pytest.approx(0, abs=2e-4)
    assert off_by(1.1)["mean_1"] == pytest.approx(0.1 * (math.e - 1), abs=2e-4)
    assert off_by(1.1)["1"] == pytest.approx(math.e - 2.5, rel=1e-3), "in the unit that was asked for"
    assert "mean_1" not in m.curvature(GROWING, x)["error"]


def test_each_path_has_its_own_condition():
    x, speed = torch.zeros(5, 1, 1, 1), torch.arange(5.0).view(5, 1, 1, 1)

    def network(state, t, conditions, r):
        return conditions["z"].expand_as(state)

    found = m.curvature(conditional(network, Conditions(z=speed)), x, batch_size=2)
    assert found["length"] == pytest.approx(math.sqrt(30 / 5) * m.GREY_LEVELS, rel=1e-5)
