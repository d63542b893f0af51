from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lediflow.errors import UserError
from lediflow.metrics import kernels
from lediflow.metrics.bootstrap import resampled
from lediflow.metrics.kernels import CMMD, KID, cubic_kernel, gaussian_kernel, mean_kernel, mmd_squared


def _random(n: int, d: int, seed: int, dtype=torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _published_cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """The formula as the paper's authors write it, all pairs at once."""
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))

    def mean(a, b):
        distances = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
        return np.exp(-distances / (2 * 10**2)).mean()

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


@pytest.mark.parametrize("block", [2048, 7])
def test_cmmd_is_the_published_formula(monkeypatch, block):
    monkeypatch.setattr(kernels, "_BLOCK", block)
    x, y = _random(40, 16, 0) + 0.3, 2 * _random(55, 16, 1)
    assert CMMD(x, y).item() == pytest.approx(_published_cmmd(x.numpy(), y.numpy()), rel=1e-9)


def test_cmmd_of_two_points_by_hand():
    # two sets of one direction each, at a right angle: their distance is sqrt(2)
    x, y = torch.tensor([[3.0, 0.0]] * 2), torch.tensor([[0.0, 0.5]] * 3)
    assert CMMD(x, y).item() == pytest.approx(2000 * (1 - math.exp(-2 / 200)), rel=1e-9)


def test_gaussian_features_give_the_closed_form():
    """E k(a, b) for a ~ N(m, s²), b ~ N(0, s²) is known, so the population's MMD is."""
    d, m, s, sigma = 3, 0.8, 0.6, 1.5

    def mean_kernel_of(shift: float) -> float:
        wide = sigma**2 + 2 * s**2
        return (sigma**2 / wide) ** (d / 2) * math.exp(-(shift**2) * d / (2 * wide))

    expected = 2 * mean_kernel_of(0) - 2 * mean_kernel_of(m)
    x, y = s * _random(4000, d, 0) + m, s * _random(4000, d, 1)
    found = mmd_squared(x, y, gaussian_kernel(sigma), unbiased=True).item()
    assert found == pytest.approx(expected, rel=0.05)


def test_v_statistic_is_zero_for_the_same_set_and_u_statistic_is_centred():
    x = _random(30, 4, 0)
    assert CMMD(x, x).item() == pytest.approx(0, abs=1e-12)
    values = [KID(_random(20, 4, 2 * i), _random(20, 4, 2 * i + 1)).item() for i in range(300)]
    scatter = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * scatter
    assert min(values) < 0


def test_kid_is_the_published_formula():
    x, y = _random(12, 5, 0), _random(9, 5, 1) + 1

    def k(a, b):
        return (a @ b.T / 5 + 1).numpy() ** 3

    xx, yy = k(x, x), k(y, y)
    within = (xx.sum() - np.trace(xx)) / (12 * 11) + (yy.sum() - np.trace(yy)) / (9 * 8)
    expected = within - 2 * k(x, y).mean()
    assert KID(x, y).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("metric", [CMMD, KID])
def test_real_set_taken_once_changes_nothing(metric):
    x, y = _random(20, 6, 0), _random(30, 6, 1)
    assert metric(x, y, within_y=metric.within(y)).item() == pytest.approx(metric(x, y).item(), rel=1e-12)


def test_a_replicate_is_the_set_with_images_repeated():
    x, y = _random(15, 4, 0), _random(20, 4, 1)
    counts = resampled(15, 3, seed=0)
    drawn = [x.repeat_interleave(c.long(), dim=0) for c in counts]
    expected = [CMMD(rows, y).item() for rows in drawn]
    assert CMMD(x, y, counts=counts).tolist() == pytest.approx(expected, rel=1e-9)


def test_unbiased_replicates_leave_out_pairs_with_a_copy():
    x = _random(6, 4, 0)
    counts = torch.tensor([[2.0, 1, 0, 1, 1, 1]], dtype=torch.float64)
    k = cubic_kernel(x, x)
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    weights = [(counts[0, i] * counts[0, j]).item() for i, j in pairs]
    expected = sum(w * k[i, j].item() for w, (i, j) in zip(weights, pairs, strict=True)) / sum(weights)
    assert mean_kernel(x, cubic_kernel, unbiased=True, counts=counts).item() == pytest.approx(expected)


def test_single_precision_features_lose_nothing():
    x, y = _random(50, 8, 0, torch.float32), _random(50, 8, 1, torch.float32)
    assert CMMD(x, y).item() == CMMD(x.double(), y.double()).item()


def test_mistakes():
    with pytest.raises(UserError, match="4 and 5 dimensions"):
        CMMD(_random(5, 4, 0), _random(5, 5, 0))
    with pytest.raises(UserError, match="at least 2"):
        KID(_random(1, 4, 0), _random(5, 4, 0))
    with pytest.raises(UserError, match="diverged"):
        CMMD(torch.full((5, 4), float("nan")), _random(5, 4, 0))
