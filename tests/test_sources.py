"""Seeds: image i depends on (seed, i) and on the stream alone."""

import pytest
import torch

from lediflow.sources import derive_seed, image_noise


def test_noise_does_not_depend_on_the_batch():
    whole = image_noise((3, 4, 4), seed=7, indices=range(6), stream="x")
    parts = [image_noise((3, 4, 4), seed=7, indices=[i], stream="x") for i in range(6)]
    assert torch.equal(whole, torch.cat(parts))


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
