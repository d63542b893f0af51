"""Seeds: image i depends on (seed, i) and on the stream alone."""

import itertools

import pytest
import torch

from lediflow.sources import BatchNoise, between, derive_seed, image_noise, optimal_coupling


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


def test_each_class_deals_out_its_own_noise():
    """Sampling draws noise independently of the class, so training must see the same within each (C2OT)."""
    g = torch.Generator().manual_seed(0)
    classes = torch.arange(64) % 2
    x, y = torch.randn(64, 1, generator=g), torch.where(classes == 0, -2.0, 2.0).view(64, 1)
    y = y + 0.3 * torch.randn(64, 1, generator=g)
    coupled = optimal_coupling(x, y, classes)
    for label in (0, 1):
        mine = classes == label
        assert torch.equal(coupled[mine].sort(0).values, x[mine].sort(0).values)
        assert torch.equal(coupled[mine].argsort(0), y[mine].argsort(0)), "and by the shortest paths"
    across = optimal_coupling(x, y)
    assert across[classes == 1].mean() > 0.5, "without classes the noise would tell the class"


def test_a_flow_on_two_classes_ends_where_they_lie():
    """The minimiser of eq. 2 on two points at +-2, by least squares on pairs: what sampling then gives."""
    g = torch.Generator().manual_seed(0)
    classes = (torch.arange(256) % 2).repeat(40)
    y = torch.where(classes == 0, -2.0, 2.0).view(-1, 1) + 0.3 * torch.randn(len(classes), 1, generator=g)
    x = torch.randn(len(classes), 1, generator=g)
    batches = zip(x.split(256), y.split(256), classes.split(256), strict=True)
    coupled = torch.cat([optimal_coupling(*batch) for batch in batches])
    mine = classes == 1
    # the straight map from this class's noise to its images
    design = torch.cat((coupled[mine], torch.ones(int(mine.sum()), 1)), dim=1)
    slope, offset = torch.linalg.lstsq(design, y[mine]).solution.flatten().tolist()
    ends = slope * torch.randn(5000, generator=g) + offset
    assert ends.mean().item() == pytest.approx(2.0, abs=0.05)
    assert ends.std().item() == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("path", ["linear", "slerp"])
def test_a_way_begins_and_ends_at_its_ends(path):
    a, b = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(between(a, b, 0.0, path), a)
    torch.testing.assert_close(between(a, b, 1.0, path), b)
    torch.testing.assert_close(between(a, a, 0.3, path), a)
    torch.testing.assert_close(between(a, -a, 0.25, path), a / 2)


def test_the_arc_keeps_the_length_and_the_straight_way_is_shorter_in_the_middle():
    a, b = torch.tensor([3.0, 0, 0]), torch.tensor([0, 3.0, 0])
    torch.testing.assert_close(
        between(a, b, 1 / 3, "slerp"), 3 * torch.tensor([3**0.5 / 2, 0.5, 0]), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(between(a, b, 1 / 3, "linear"), torch.tensor([2.0, 1.0, 0]))
