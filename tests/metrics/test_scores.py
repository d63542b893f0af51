"""All metrics of two sets of features, and training images among the generated ones."""

from __future__ import annotations

import pytest
import torch

from lediflow.metrics.classifier import SmallClassifier
from lediflow.metrics.features import ClassifierFeatures
from lediflow.metrics.scores import DISTANCES, MEANINGS, RealFeatures, copies, distances


def test_distances_by_hand_and_without_replicates():
    network = ClassifierFeatures(SmallClassifier(1, 2), "cpu")  # for its names alone
    real = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    same = distances(network, real.clone(), RealFeatures.of(real), replicates=0, seed=0)
    assert same["frechet"].value == pytest.approx(0, abs=1e-6)
    assert same["precision"].value == same["recall"].value == same["coverage"].value == 1
    assert all(found.low == found.value == found.high for found in same.values())
    assert set(same) < set(MEANINGS) and set(same) & set(DISTANCES) == {"mmd", "kernel", "frechet"}
    apart = distances(network, real + 3, RealFeatures.of(real), replicates=20, seed=0)
    assert apart["frechet"].value == pytest.approx(36, rel=1e-3)
    assert apart["frechet"].low < 36 < apart["frechet"].high
    assert apart["coverage"].value < 0.05


def test_copies_are_found_and_named():
    generator = torch.Generator().manual_seed(0)
    train, unseen, new = (torch.randn(200, 3, generator=generator) for _ in range(3))
    generated = torch.cat([new[:150], train[50:100]])
    share, closest = copies(generated, RealFeatures.of(train), unseen, replicates=10, seed=0)
    assert 0.25 <= share.value < 0.35
    assert all(c["training_image"] == c["image"] - 100 for c in closest), "rows 150 to 199 copy 50 to 99"
