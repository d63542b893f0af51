from __future__ import annotations

import pytest
import torch

from lediflow.metrics.bootstrap import estimate, estimate_mean, resampled
from lediflow.metrics.frechet import Moments, frechet_distance, frechet_replicates


def test_each_replicate_draws_as_many_images_as_there_are():
    counts = resampled(50, 20, seed=0)
    assert counts.shape == (20, 50)
    assert (counts.sum(1) == 50).all()
    assert torch.equal(counts, resampled(50, 20, seed=0))
    assert not torch.equal(counts, resampled(50, 20, seed=1))
    # each image is absent from a share 1/e of the replicates
    assert (resampled(100, 500, seed=2) == 0).double().mean().item() == pytest.approx(0.366, abs=0.01)


def test_interval_of_a_mean_covers_what_theory_says():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 3 + 7
    found = estimate_mean(values, resampled(400, 2000, seed=1))
    half = 1.96 * values.std().item() / 20
    assert found.value == pytest.approx(values.double().mean().item())
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)


def test_the_shift_of_resampling_is_no_uncertainty_and_bounds_hold():
    found = estimate(1.0, torch.linspace(4, 6, 101, dtype=torch.float64))
    assert (found.low, found.high) == pytest.approx((0.05, 1.95))
    assert estimate(0.5, torch.linspace(4, 6, 101), least=0.0, most=1.0).low == 0.0
    assert estimate(0.5, torch.linspace(4, 6, 101), least=0.0, most=1.0).high == 1.0
    assert estimate(0.5, torch.empty(0)) == estimate(0.5, torch.tensor([3.0]))


def test_frechet_replicate_is_the_distance_of_the_repeated_images():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=generator), torch.randn(60, 5, generator=generator) + 1
    counts = resampled(40, 4, seed=0)
    expected = [frechet_distance(x.repeat_interleave(c.long(), dim=0), y) for c in counts]
    assert frechet_replicates(x, Moments.of(y), counts).tolist() == pytest.approx(expected, rel=1e-6)
