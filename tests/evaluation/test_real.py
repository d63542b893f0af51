from __future__ import annotations

import pytest
import torch
from PIL import Image

from lediflow.errors import UserError
from lediflow.evaluation import real
from lediflow.evaluation.real import (
    RealImages,
    classifier_features,
    features_of,
    real_features,
)
from lediflow.files import default_cache
from lediflow.metrics.features import FeatureNetwork


class Means(FeatureNetwork):
    """Mean and variance of the pixels, counting its calls."""

    name, digest = "means", "means-1"

    def __init__(self):
        super().__init__("cpu")
        self.calls = 0

    def _features(self, pixels):
        self.calls += 1
        x = pixels.float().flatten(1)
        return torch.stack([x.mean(1), x.var(1)], 1)


def _folder(path, count=12, shade=20):
    path.mkdir()
    for i in range(count):
        Image.new("RGB", (10, 10), (shade * i % 256, 5, 9)).save(path / f"{i:02d}.png")
    return str(path)


def test_pixels_are_those_of_the_data_evenly_spread():
    images = RealImages("digits", "train", (1, 16, 16), 100)
    every = RealImages("digits", "train", (1, 16, 16), 10**6)
    assert (len(images), len(every), images.num_classes) == (100, 1500, 10)
    assert images.pixels(range(3)).shape == (3, 1, 16, 16)
    assert torch.equal(images.pixels(range(99, 100)), every.pixels(range(1499, 1500)))
    assert torch.equal(images.pixels(torch.tensor([99, 0])), every.pixels([1499, 0]))
    assert torch.equal(images.labels()[[0, 99]], every.labels()[[0, 1499]])


def test_hash_is_of_the_content_not_of_the_name(tmp_path):
    a, b = _folder(tmp_path / "a"), _folder(tmp_path / "b")
    other = _folder(tmp_path / "c", shade=21)

    def digest(folder, shape=(3, 10, 10)):
        return RealImages(folder, "train", shape, 99).content_hash()

    assert digest(a) == digest(b) != digest(other)
    assert digest(a) != digest(a, (3, 5, 5)) != digest(a, (1, 5, 5))


def test_features_are_taken_once_and_found_again(tmp_path):
    folder, network = _folder(tmp_path / "a"), Means()
    images = RealImages(folder, "train", (3, 10, 10), 99)
    first = real_features(images, network, tmp_path / "cache", 5)
    assert network.calls == 3
    again = real_features(RealImages(folder, "train", (3, 10, 10), 99), network, tmp_path / "cache", 5)
    assert network.calls == 3
    assert torch.equal(first.features, again.features)
    torch.testing.assert_close(first.moments.covariance, again.moments.covariance)
    assert (first.within_mmd, first.within_kernel) == (again.within_mmd, again.within_kernel)
    torch.testing.assert_close(first.features[:, 0], images.pixels(range(12)).float().flatten(1).mean(1))


def test_a_damaged_cache_and_another_network_are_measured_again(tmp_path):
    images, network = RealImages(_folder(tmp_path / "a"), "train", (3, 10, 10), 99), Means()
    real_features(images, network, tmp_path / "cache", 12)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(b"half")
    real_features(images, network, tmp_path / "cache", 12)
    assert network.calls == 2
    network.digest = "means-2"
    real_features(images, network, tmp_path / "cache", 12)
    assert network.calls == 3


def test_classifier_is_trained_once(tmp_path, monkeypatch):
    images = RealImages("digits", "train", (1, 16, 16), 200)
    first = classifier_features(images, tmp_path, torch.device("cpu"), steps=5, seed=0)
    monkeypatch.setattr(real, "train_classifier", None)
    again = classifier_features(images, tmp_path, torch.device("cpu"), steps=5, seed=0)
    assert first.digest == again.digest
    pixels = images.pixels(range(9))
    assert torch.equal(first(pixels), again(pixels))


def test_features_are_taken_batch_by_batch_and_stay_in_order():
    network, asked = Means(), []

    def pixels(indices):
        asked.append(indices)
        return torch.tensor(indices, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)

    first, second = features_of(10, 4, pixels, [network, network], label="some")
    assert asked == [range(4), range(4, 8), range(8, 10)]
    assert first[:, 0].tolist() == list(range(10)) and torch.equal(first, second)


def test_the_classifier_never_holds_all_pixels(tmp_path, monkeypatch):
    images, asked = RealImages("digits", "train", (1, 16, 16), 1500), []
    pixels = RealImages.pixels
    monkeypatch.setattr(RealImages, "pixels", lambda self, i: asked.append(len(i)) or pixels(self, i))
    classifier_features(images, tmp_path, torch.device("cpu"), steps=2, seed=0)
    assert max(asked) == 512


def test_classifier_without_labels(tmp_path):
    images = RealImages(_folder(tmp_path / "a"), "train", (3, 10, 10), 99)
    with pytest.raises(UserError, match="no classes"):
        classifier_features(images, tmp_path, torch.device("cpu"), steps=5, seed=0)


def test_cache_that_cannot_be_written(tmp_path):
    images = RealImages(_folder(tmp_path / "a"), "train", (3, 10, 10), 99)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache"):
        real_features(images, Means(), tmp_path / "file", 12)


def test_default_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "lediflow"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache().name == "lediflow"
