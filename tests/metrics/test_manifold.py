from __future__ import annotations

import pytest
import sklearn
import torch

from lediflow.errors import UserError
from lediflow.metrics.manifold import closer_than_new, manifold, nearest_neighbours


def _normal(n: int, seed: int, shift: float = 0.0):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)) + shift


def test_by_hand_on_a_line():
    # with k = 1 the radii of the real points are 1, 1 and 8; of the generated ones 1.5, 1.5 and 98.5
    real = torch.tensor([[0.0], [1.0], [9.0]])
    generated = torch.tensor([[0.0], [1.5], [100.0]]) - 0.25
    found = manifold(generated, real, k=1)
    assert found.precision.tolist() == [1, 1, 0]
    # -0.25 is within 1 of 0; 1.25 is within 1 of 1 and within 8 of 9
    assert found.density.tolist() == [1, 2, 0]
    assert found.recall.tolist() == [1, 1, 1]
    assert found.coverage.tolist() == [1, 1, 1]


def test_same_distribution_apart_and_collapsed():
    real = _normal(200, 0)

    def means(generated):
        found = manifold(generated, real)
        return [getattr(found, name).mean().item() for name in ("precision", "density", "recall", "coverage")]

    precision, density, recall, coverage = means(_normal(200, 1))
    assert precision > 0.9
    assert density == pytest.approx(1, abs=0.15)
    assert recall > 0.9
    assert coverage == pytest.approx(1 - 0.5**5, abs=0.06)  # what the paper derives for equal counts
    assert means(_normal(200, 1, shift=50)) == [0, 0, 0, 0]
    precision, _, recall, coverage = means(0.01 * _normal(200, 1))
    assert precision == 1
    assert recall < 0.05
    assert coverage < 0.2


def test_the_four_shares_by_their_definitions_whatever_the_blocks():
    real, generated, k = _normal(90, 0).double(), 1.3 * _normal(70, 1).double(), 5
    across, among = torch.cdist(generated, real), torch.cdist(generated, generated)
    real_radius = torch.cdist(real, real).kthvalue(k + 1, dim=1).values  # each is its own nearest
    inside = across < real_radius
    for memory in (1024, 0.01):
        with sklearn.config_context(working_memory=memory):
            found = manifold(generated, real, k=k)
        assert torch.equal(found.precision, inside.any(1).double())
        torch.testing.assert_close(found.density, inside.sum(1) / k, check_dtype=False)
        within = across < among.kthvalue(k + 1, dim=1).values[:, None]
        assert torch.equal(found.recall, within.any(0).double())
        assert torch.equal(found.coverage, (across.amin(0) < real_radius).double())


def test_nearest_neighbours():
    bank, queries = _normal(30, 0), _normal(10, 1)
    distance, index = nearest_neighbours(queries, bank)
    expected = torch.cdist(queries.double(), bank.double()).min(1)
    torch.testing.assert_close(distance, expected.values)
    assert torch.equal(index, expected.indices)
    others = torch.cdist(bank.double(), bank.double()).fill_diagonal_(torch.inf).min(1)
    distance, index = nearest_neighbours(bank, bank, itself=True)
    torch.testing.assert_close(distance, others.values, atol=1e-7, rtol=0)
    assert torch.equal(index, others.indices)


def test_copies_are_told_from_new_images():
    train, unseen = _normal(400, 0), _normal(300, 1)
    yardstick, _ = nearest_neighbours(unseen, train)
    new, _ = nearest_neighbours(_normal(300, 2), train)
    copies, _ = nearest_neighbours(train[:100] + 1e-4, train)
    assert closer_than_new(new, yardstick).mean().item() < 0.05
    assert closer_than_new(copies, yardstick).mean().item() == 1


def test_mistakes():
    with pytest.raises(UserError, match="at least 6"):
        manifold(_normal(5, 0), _normal(50, 1))
    with pytest.raises(UserError, match="same feature network"):
        manifold(_normal(50, 0), torch.zeros(50, 3))
    with pytest.raises(UserError, match="diverged"):
        manifold(torch.full((50, 2), float("nan")), _normal(50, 0))
