from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from lediflow.errors import UserError
from lediflow.metrics import frechet
from lediflow.metrics.frechet import Moments, frechet_distance


def _random(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with_moments(mean: Tensor, covariance: Tensor, n: int, seed: int) -> Tensor:
    """Features whose sample mean and covariance are exactly those given."""
    raw = _random(n, len(mean), seed)
    raw = raw - raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(raw.T @ raw / (n - 1))).T
    return mean + white @ torch.linalg.cholesky(covariance).T


def _covariance(d: int, seed: int) -> Tensor:
    factor = _random(d, d, seed)
    return factor @ factor.T + 0.1 * torch.eye(d, dtype=torch.float64)


def test_diagonal_case_by_hand():
    a = _with_moments(torch.tensor([0.0, 1.0]).double(), torch.diag(torch.tensor([4.0, 9.0]).double()), 50, 0)
    b = _with_moments(
        torch.tensor([3.0, 1.0]).double(), torch.diag(torch.tensor([1.0, 25.0]).double()), 80, 1
    )
    # 3² for the means; (2 - 1)² + (3 - 5)² for the deviations.
    assert frechet_distance(a, b) == pytest.approx(9 + 1 + 4, rel=1e-10)


def test_agrees_with_the_formula_through_scipy():
    from scipy.linalg import sqrtm

    mean, cov_a, cov_b = _random(2, 12, 0), _covariance(12, 1), _covariance(12, 2)
    a, b = _with_moments(mean[0], cov_a, 60, 3), _with_moments(mean[1], cov_b, 90, 4)
    cross = np.trace(sqrtm((cov_a @ cov_b).numpy())).real
    expected = (mean[0] - mean[1]).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_symmetric_and_zero_for_the_same_set():
    a, b = _random(100, 8, 0), 2 * _random(60, 8, 1) + 1
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_rotating_and_moving_both_changes_nothing_and_scaling_squares():
    a, b = _random(100, 8, 0), 2 * _random(60, 8, 1) + 1
    turn = torch.linalg.qr(_random(8, 8, 2)).Q
    distance = frechet_distance(a, b)
    assert frechet_distance(a @ turn + 5, b @ turn + 5) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * distance, rel=1e-9)


def test_constant_features_are_no_trouble():
    a = _random(100, 8, 0)
    point = torch.zeros(20, 8)
    expected = a.mean(0).square().sum() + a.var(0).sum()
    assert frechet_distance(a, point) == pytest.approx(expected.item(), rel=1e-10)


def test_single_precision_is_computed_in_double():
    a, b = _random(100, 8, 0).float(), _random(100, 8, 1).float()
    assert frechet_distance(a, b) == frechet_distance(a.double(), b.double())


def test_moments_are_those_of_all_samples_whatever_the_batch(monkeypatch):
    features = 3 * _random(101, 6, 0) + 1000
    monkeypatch.setattr(frechet, "_BATCH", 7)
    moments = Moments.of(features)
    assert moments.count == 101
    torch.testing.assert_close(moments.mean, features.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.covariance, features.T.cov(), rtol=1e-9, atol=1e-12)
    other = _random(50, 6, 1)
    assert frechet_distance(moments, other) == frechet_distance(features, Moments.of(other))


def test_moments_far_from_zero_in_single_precision_do_not_cancel():
    features = (_random(64, 2, 0) + 1e4).float()
    expected = features.double().T.cov()
    torch.testing.assert_close(Moments.of(features).covariance, expected, rtol=1e-9, atol=0)


def test_warns_when_the_samples_do_not_fill_the_space():
    with pytest.warns(UserWarning, match="8 samples do not determine"):
        frechet_distance(_random(100, 8, 0), _random(8, 8, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(_random(100, 8, 0), _random(9, 8, 1))


def test_mistakes():
    with pytest.raises(UserError, match="8 and 7 dimensions"):
        frechet_distance(_random(20, 8, 0), _random(20, 7, 0))
    with pytest.raises(UserError, match="at least 2 samples"):
        frechet_distance(_random(20, 8, 0), _random(1, 8, 0))
    with pytest.raises(UserError, match="N, D"):
        frechet_distance(torch.zeros(5), torch.zeros(5))
    with pytest.raises(UserError, match="not finite"):
        frechet_distance(_random(20, 8, 0), torch.full((20, 8), float("nan")))


def test_fewer_samples_of_one_distribution_lie_farther_away():
    reference = _random(2000, 8, 0)
    few = np.mean([frechet_distance(_random(40, 8, seed), reference) for seed in range(1, 40)])
    assert frechet_distance(_random(1600, 8, 99), reference) < 0.5 * few
