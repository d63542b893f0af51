"""The average velocity of a network: r, its derivative in forward mode, in bf16, compiled, by any backend."""

import copy
import warnings

import pytest
import torch
from conftest import randomized
from test_models import LABEL, SMALL, Z

from lediflow import flow
from lediflow.conditions import Conditions
from lediflow.networks.attention import forward_mode, self_attention
from lediflow.networks.velocity import IntervalFeatures, VelocityTransformer


def network(**changes):
    conditions = {"label": LABEL, "z": {**Z, "size": 4}}
    return VelocityTransformer(16, 3, 2, average_velocity=True, conditions=conditions, **{**SMALL, **changes})


@pytest.fixture
def point():
    g = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 4, 3, 16, 16, generator=g)
    t = 0.6 * torch.rand(4, generator=g)
    return {"x": x, "v": v, "t": t, "r": t + 0.3, "z": torch.randn(4, 2, 4, 4, generator=g)}


def conditions_of(p):
    """A z for each image and three classes; the last image has none."""
    labels = Conditions(label=torch.tensor([0, 1, 2, 0])).drop("label", torch.tensor([False] * 3 + [True]))
    return labels.also(z=p["z"])


def correction(net, p, dtype=None):
    with forward_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        return flow.average_velocity_correction(
            lambda x, t: net(x, t, conditions_of(p), p["r"]), p["x"], p["v"], p["t"], p["r"]
        )


def by_differences(net, p, step=1e-5):
    """(r - t) times the slope along (v, 1), by central differences in float64."""
    net = copy.deepcopy(net).double()
    p = {name: value.double() for name, value in p.items()}
    with torch.no_grad():
        ends = [net(p["x"] + s * p["v"], p["t"] + s, conditions_of(p), p["r"]) for s in (step, -step)]
    return (ends[0] - ends[1]) / (2 * step) * (p["r"] - p["t"]).view(-1, 1, 1, 1)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_a_fresh_interval_changes_nothing_and_a_trained_one_does(point):
    net = randomized(network())
    x, t, r, given = point["x"], point["t"], point["r"], conditions_of(point)
    velocity = net(x, t, given)
    assert torch.equal(net(x, t, given, t), velocity), "r = t is the velocity"
    assert relative(net(x, t, given, r), velocity) > 1e-3
    torch.nn.init.zeros_(net.interval_in.weight)
    assert torch.equal(net(x, t, given, r), velocity)


def test_weights_of_a_plain_network_fit():
    plain = randomized(VelocityTransformer(8, 3, 2, **SMALL))
    net = VelocityTransformer(8, 3, 2, average_velocity=True, **SMALL)
    missing = net.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert sorted(missing.missing_keys) == ["interval_features.frequencies", "interval_in.weight"]
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    assert torch.equal(net(x, t, r=torch.ones(2)), plain(x, t))


def test_a_network_without_average_velocity_takes_no_r():
    net = VelocityTransformer(8, 3, 2, **SMALL)
    with pytest.raises(ValueError, match="no average velocity"):
        net(torch.randn(1, 3, 8, 8), torch.zeros(1), r=torch.ones(1))


def test_an_interval_that_ends_before_it_starts_is_refused():
    net = VelocityTransformer(8, 3, 2, average_velocity=True, **SMALL)
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="r must be at least t"):
        net(x, torch.tensor([0.2, 0.5]), r=torch.tensor([0.3, 0.4]))


def test_interval_features_are_zero_at_zero_and_tell_lengths_apart():
    features = IntervalFeatures(16)
    assert torch.equal(features(torch.zeros(1)), torch.zeros(1, 16))
    lengths = features(torch.linspace(0, 1, 11))
    assert torch.pdist(lengths).min() > 0.05


def test_the_derivative_is_that_of_finite_differences(point):
    net = randomized(network())
    assert relative(correction(net, point), by_differences(net, point)) < 1e-4


def test_the_derivative_in_bf16_is_near(point):
    net = randomized(network(), scale=0.1)
    assert relative(correction(net, point, torch.bfloat16), by_differences(net, point)) < 0.1


@pytest.mark.parametrize("how", ["blocks", "model"])
def test_the_derivative_of_a_compiled_network(how, point):
    net = randomized(network())
    expected = correction(net, point)
    net.compile_as(how, backend="eager")
    assert relative(correction(net, point), expected) < 1e-5


def test_the_derivative_through_tiles(point, monkeypatch):
    net = randomized(network())
    expected = correction(net, point)
    monkeypatch.setenv("LEDIFLOW_ATTENTION", "tiles")
    assert relative(correction(net, point), expected) < 1e-5


@pytest.mark.parametrize("backend", ["flex", "natten"])
def test_a_backend_without_forward_mode_is_replaced_with_a_warning(backend):
    q, k, v = torch.randn(3, 1, 1, 64, 8)
    with forward_mode(), pytest.warns(UserWarning, match=f"{backend}.*no derivative in forward mode"):
        ours = self_attention(q, k, v, (8, 8), 3, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative(ours, self_attention(q, k, v, (8, 8), 3, backend="dense")) < 1e-5


def test_it_comes_back_from_disk(tmp_path, point):
    net = randomized(network())
    net.save_pretrained(tmp_path)
    again = VelocityTransformer.from_pretrained(tmp_path)
    x, t, r, given = point["x"], point["t"], point["r"], conditions_of(point)
    assert again.average_velocity
    assert torch.equal(again(x, t, given, r), net(x, t, given, r))
