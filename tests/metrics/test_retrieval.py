"""R-precision on features whose nearest neighbours are known."""

import pytest
import torch

from lediflow.errors import UserError
from lediflow.metrics.retrieval import name_ranks, r_precision

ANGLES = torch.tensor([0.0, 90.0, 180.0, 270.0]).deg2rad()
REAL = torch.stack((ANGLES.cos(), ANGLES.sin()), dim=1)
NAMES = torch.arange(4)


def at(*degrees):
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def test_a_name_is_as_near_as_its_nearest_real_image():
    made, asked = at(1.0, 1.0, 1.0, 1.0), torch.tensor([0, 1, 3, 2])
    assert name_ranks(made, asked, REAL, NAMES).tolist() == [0, 1, 2, 3]
    # name 1 gets a second image at 5 degrees, far from its first
    real, names = torch.cat((REAL, at(5.0))), torch.tensor([0, 1, 2, 3, 1])
    assert name_ranks(made[:1], torch.tensor([2]), real, names).tolist() == [3]
    assert name_ranks(at(6.0), torch.tensor([1]), real, names).tolist() == [0]


def test_shares_and_chance():
    ranks = torch.tensor([0, 1, 4, 5, 49])
    assert r_precision(ranks, 1).mean() == 0.2 and r_precision(ranks, 5).mean() == 0.6
    generator = torch.Generator().manual_seed(0)
    made, real = (torch.randn(n, 16, generator=generator) for n in (4000, 50))
    asked = torch.arange(4000) % 50
    ranks = name_ranks(made, asked, real, torch.arange(50))
    assert abs(r_precision(ranks, 1).mean() - 0.02) < 0.01
    assert abs(r_precision(ranks, 5).mean() - 0.1) < 0.02


def test_a_name_without_real_images_is_refused():
    with pytest.raises(UserError, match="only 4 of 6 names"):
        name_ranks(at(1.0), torch.tensor([5]), REAL, NAMES)
