"""Averages of the weights against their closed forms."""

import pytest
import torch

from lediflow.training.averages import Averages, decay_at
from lediflow.training.config import AverageConfig


def test_power_schedule_is_that_of_hdit():
    settings = AverageConfig(max_decay=0.99)
    assert [decay_at(n, settings, 8) for n in (1, 8, 27)] == pytest.approx([0, 1 - 1 / 4, 1 - 1 / 9])
    assert decay_at(10**6, settings, 8) == 0.99


def test_half_life_counts_images_and_ramps_up():
    settings = AverageConfig(half_life=6400)
    assert decay_at(10**6, settings, 64) == pytest.approx(0.5 ** (1 / 100))
    assert decay_at(10**6, settings, 640) == pytest.approx(0.5 ** (1 / 10)), "of images, not of steps"
    assert decay_at(100, settings, 64) == pytest.approx(0.5 ** (64 / (0.05 * 6400)))


def test_several_averages_move_as_their_decays_say():
    weight = torch.nn.Parameter(torch.zeros(3))
    settings = (AverageConfig(name="fast", power=0.5), AverageConfig(name="slow", half_life=10))
    averages = Averages([weight], settings, batch_size=2)
    expected = {"fast": 0.0, "slow": 0.0}
    for step in range(1, 20):
        with torch.no_grad():
            weight.fill_(step)
        averages.update([weight])
        for s in settings:
            decay = decay_at(step, s, 2)
            expected[s.name] = decay * expected[s.name] + (1 - decay) * step
    for name, value in expected.items():
        torch.testing.assert_close(averages.tensors[name][0], torch.full((3,), value))
    assert averages.first is averages.tensors["fast"]


def test_averages_are_lent_to_the_weights_in_place():
    weight = torch.nn.Parameter(torch.ones(3))
    averages = Averages([weight], (AverageConfig(),), batch_size=2)
    with torch.no_grad():
        weight.fill_(5)
    with averages.used_by([weight]):
        assert (weight == 1).all()
    assert (weight == 5).all()
    assert (averages.first[0] == 1).all()
