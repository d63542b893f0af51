"""Seeds: image i depends on (seed, i) and on the stream alone."""

import itertools

import pytest
import torch

from lediflow.sources import BatchNoise, derive_seed, image_noise, optimal_coupling


def test_noise_does_not_depend_on_the_batch():
    whole = image_noise((3, 4, 4), seed=7, indices=range(6), stream="x")
    parts = [image_noise((3, 4, 4), seed=7, indices=[i], stream="x") for i in range(6)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2), (3, 5, 7)])
def test_the_noise_of_a_seed_is_fixed_for_ever(shape):
    """Below 16 numbers torch draws in another way; both are what torch.randn gives for one image."""
    noise = image_noise(shape, seed=5, indices=(4, 0), stream="x", dtype=torch.float64)
    for row, index in zip(noise, (4, 0), strict=True):
        generator = torch.Generator().manual_seed(derive_seed(5, "x", index))
        assert torch.equal(row, torch.randn(shape, generator=generator).double())


def test_seeds_indices_and_streams_are_independent():
    def noise(seed, index, stream):
        return image_noise((1, 100, 100), seed=seed, indices=[index], stream=stream).flatten()

    base = noise(0, 0, "x")
    for other in (noise(1, 0, "x"), noise(0, 1, "x"), noise(0, 0, "w")):
        assert abs(torch.corrcoef(torch.stack((base, other)))[0, 1]) < 0.05
    assert base.mean().item() == pytest.approx(0, abs=0.05)
    assert base.std().item() == pytest.approx(1, abs=0.05)


def test_derived_seeds_are_fixed_for_ever():
    """A change here would change every image that a seed stands for."""
    assert derive_seed(0, "x", 0) == 3530328692663980643
    assert 0 <= derive_seed(2**70, "anything") < 2**63


def test_parts_of_a_batch_meet_the_noise_of_the_whole():
    def noise(start, stop, seed=3):
        return BatchNoise(seed, batch_size=12, positions=range(start, stop), device=torch.device("cpu"))

    whole, parts = noise(0, 12), [noise(0, 3), noise(3, 4), noise(4, 12)]
    for draw in (
        lambda n: n.normal((2, 5, 5), "x"),
        lambda n: n.uniform("label"),
        lambda n: n.times(),
    ):
        assert torch.equal(draw(whole), torch.cat([draw(part) for part in parts]))
        assert not torch.equal(draw(whole), draw(noise(0, 12, seed=4)))
    assert not torch.equal(whole.normal((4,), "x"), whole.normal((4,), "z"))
    assert sorted((whole.times() * 12).long().tolist()) == list(range(12)), "stratified over the whole batch"
    drawn = torch.cat([noise(0, 12, seed).normal((100,), "x") for seed in range(10)])
    assert drawn.mean().item() == pytest.approx(0, abs=0.03)
    assert drawn.std().item() == pytest.approx(1, abs=0.03)


def test_optimal_coupling_on_a_line_is_the_sorted_one():
    """In one dimension the plan of least squares pairs the k-th smallest with the k-th smallest."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 1, generator=g), 3 * torch.randn(50, 1, generator=g) + 1
    coupled = optimal_coupling(x, y)
    assert torch.equal(coupled[y[:, 0].argsort()], x.sort(0).values)


def test_optimal_coupling_beats_every_other_order():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(5, 2, 3, 3, generator=g), torch.randn(5, 2, 3, 3, generator=g)
    least = min((y - x[list(order)]).square().sum().item() for order in itertools.permutations(range(5)))
    assert (y - optimal_coupling(x, y)).square().sum().item() == pytest.approx(least)
