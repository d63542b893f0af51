"""Velocity fields against their formulas, for any condition and for the average velocity too."""

import pytest
import torch
from conftest import randomized

from lediflow import fields, ode
from lediflow.conditions import Conditions
from lediflow.networks.velocity import VelocityTransformer


@pytest.fixture
def network():
    conditions = {
        "label": {"embedder": "class", "classes": 3},
        "noise_level": {"embedder": "scalar", "optional": True},
        "z": {"embedder": "grid", "channels": 2, "size": 2, "optional": True},
        "image": {"embedder": "flat", "channels": 1, "size": 4, "optional": True},
    }
    return randomized(
        VelocityTransformer(
            8, 1, 2, (16,), (1,), d_head=8, mapping_width=16, mapping_depth=1,
            conditions=conditions, average_velocity=True,
        )
    ).requires_grad_(False)  # fmt: skip


@pytest.fixture
def told():
    return Conditions(
        label=torch.tensor([2, 0, 1]),
        noise_level=torch.rand(3),
        z=torch.randn(3, 2, 2, 2),
        image=torch.randn(3, 1, 4, 4),
    )


@pytest.fixture
def x():
    return torch.randn(3, 1, 8, 8)


def test_conditional_is_the_network(network, told, x):
    field = fields.conditional(network, told)
    t, r = torch.tensor(0.4), torch.tensor(0.9)
    assert field.evaluations == 1
    assert torch.equal(field(t, x), network(x, t, told))
    assert torch.equal(field(t, x, r), network(x, t, told, r))
    assert not torch.equal(field(t, x, r), field(t, x))


@pytest.mark.parametrize("name", ["label", "noise_level", "z", "image"])
@pytest.mark.parametrize("r", [None, torch.tensor(0.9)], ids=["velocity", "average"])
def test_guidance_is_its_formula_for_any_condition_in_one_doubled_batch(name, r, network, told, x):
    t = torch.tensor(0.4)
    given, none = network(x, t, told, r), network(x, t, told.drop(name), r)
    assert (given - none).abs().max() > 1e-2, "the condition is seen"
    calls = []
    hook = network.register_forward_hook(lambda _m, inputs, _o: calls.append(len(inputs[0])))
    for guidance, evaluations, rows in ((1.0, 1, 3), (2.5, 2, 6), (0.0, 2, 6)):
        field = fields.guided(network, told, guidance, drop=name)
        torch.testing.assert_close(field(t, x, r), none + guidance * (given - none), rtol=1e-4, atol=1e-5)
        assert field.evaluations == evaluations
        assert calls == [rows]
        calls.clear()
    hook.remove()


def test_what_is_dropped_already_stays_dropped_in_both_halves(network, told, x):
    """Rows without a class have none to guide by, and another condition is left alone."""
    without = told.drop("label").drop("z", torch.tensor([True, False, False]))
    field = fields.guided(network, without, 3.0)
    t = torch.tensor(0.4)
    torch.testing.assert_close(field(t, x), network(x, t, without), rtol=1e-4, atol=1e-5)


def test_one_can_only_guide_by_what_is_there(network, x):
    with pytest.raises(KeyError, match="label"):
        fields.guided(network, Conditions(), 2.0)


def test_the_solvers_count_a_guided_evaluation_twice(network, told, x):
    guided = fields.guided(network, told, 2.0)
    assert ode.integrate(guided, x, steps=3, solver="midpoint").nfe == 12
    solution = ode.integrate(guided, x, steps=2, solver="mean")
    assert solution.nfe == 4
    half = torch.tensor(0.5)
    by_hand = x + half * guided(torch.tensor(0.0), x, half)
    by_hand = by_hand + half * guided(half, by_hand, torch.tensor(1.0))
    torch.testing.assert_close(solution.end, by_hand)


def weak_network():
    """A worse network, which is told less."""
    conditions = {"label": {"embedder": "class", "classes": 3}}
    return randomized(
        VelocityTransformer(8, 1, 2, (16,), (1,), d_head=8, mapping_width=16, conditions=conditions), 0.1
    ).requires_grad_(False)


def test_autoguidance_goes_away_from_the_weak_network(network, told, x):
    t, weak = torch.tensor(0.4), weak_network()
    given, bad = network(x, t, told), weak(x, t, told.only(["label"]))
    alone = fields.guided(network, told, weak=weak, autoguidance=1.5)
    assert alone.evaluations == 2
    torch.testing.assert_close(alone(t, x), bad + 1.5 * (given - bad), rtol=1e-4, atol=1e-5)
    none = network(x, t, told.drop("label"))
    both = fields.guided(network, told, 2.0, weak=weak, autoguidance=1.5)
    assert both.evaluations == 3
    expected = given + 1.0 * (given - none) + 0.5 * (given - bad)
    torch.testing.assert_close(both(t, x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="weak network"):
        fields.guided(network, told, autoguidance=1.5)


def test_every_image_may_have_a_strength_of_its_own(network, told, x):
    t, weak, g, w = (
        torch.rand(3),
        weak_network(),
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([2.0, 1.0, 1.5]),
    )
    field = fields.guided(network, told, g, weak=weak, autoguidance=w)
    every = field(t, x)
    for i in range(3):
        one = fields.guided(network, told.rows([i]), g[i].item(), weak=weak, autoguidance=w[i].item())
        torch.testing.assert_close(every[[i]], one(t[[i]], x[[i]]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(field.rows([2, 0])(t[[2, 0]], x[[2, 0]]), every[[2, 0]], rtol=1e-4, atol=1e-5)


# Inpainting, eq. 7


def hole(count=3):
    generate = torch.zeros(count, 1, 8, 8, dtype=torch.bool)
    generate[:, :, 2:6, 3:7] = True
    return generate


@pytest.mark.parametrize("r", [None, torch.tensor(0.9)], ids=["velocity", "average"])
def test_inpainting_follows_the_network_in_the_hole_and_a_straight_line_elsewhere(r, network, told, x):
    y, generate, t = torch.randn_like(x), hole(), torch.tensor(0.4)
    inner = fields.guided(network, told, 2.5)
    field = fields.inpainted(inner, generate, y - x)
    assert torch.equal(field(t, x, r), torch.where(generate, inner(t, x, r), y - x))
    assert field.evaluations == 2
    one = field.rows([1])
    torch.testing.assert_close(one(t, x[1:2], r), field(t, x, r)[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("solver", ode.SOLVERS)
def test_known_pixels_are_on_the_straight_path_at_all_times_of_every_solver(solver, steps, network, told, x):
    y, generate = torch.randn_like(x), hole()
    field = fields.inpainted(fields.conditional(network, told), generate, y - x)
    solution = ode.integrate(field, x, steps=steps, solver=solver, trajectory=True)
    known = ~generate.expand_as(x)
    for t, state in zip(solution.times, solution.trajectory, strict=True):
        path = (1 - t) * x + t * y
        torch.testing.assert_close(state[known], path[known].to(state), rtol=0, atol=2e-6)
    assert (solution.end - y)[~known].abs().max() > 1e-2
