from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lediflow.errors import UserError
from lediflow.evaluation.features import SmallClassifier, accuracy, extract_features, train_classifier
from lediflow.evaluation.metrics import frechet_at_count, frechet_floor

TRAIN = 1500


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(small), generator=torch.Generator().manual_seed(0))
    images = F.interpolate(small, size=16, mode="bicubic").clamp(-1, 1)
    return images[order], torch.tensor(bunch.target)[order]


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> SmallClassifier:
    images, labels = digits
    return train_classifier(images[:TRAIN], labels[:TRAIN], num_classes=10, seed=0, steps=150)


def _short(images: Tensor, labels: Tensor, seed: int = 0, **options) -> SmallClassifier:
    return train_classifier(images, labels, num_classes=10, seed=seed, steps=3, batch_size=16, **options)


def test_learns_the_digits(trained, digits):
    images, labels = digits
    assert accuracy(trained, images[TRAIN:], labels[TRAIN:]) > 0.93


def test_comes_back_frozen_and_in_evaluation_mode(trained):
    assert not trained.training
    assert not any(p.requires_grad for p in trained.parameters())


def test_size_of_the_network():
    assert 80_000 < sum(p.numel() for p in SmallClassifier(1, 10).parameters()) < 120_000


def test_features_are_scaled_by_the_training_set(trained, digits):
    features = extract_features(trained, digits[0][:TRAIN])
    assert features.shape == (TRAIN, 64)
    assert features.dtype == torch.float64
    assert features.var(dim=0).sum().item() == pytest.approx(64, rel=1e-4)


def test_features_do_not_depend_on_the_batch_size(trained, digits):
    images = digits[0][:50]
    torch.testing.assert_close(
        extract_features(trained, images, batch_size=7),
        extract_features(trained, images),
        rtol=1e-4,
        atol=1e-5,
    )


def test_logits_are_the_head_on_the_unscaled_features(trained, digits):
    images = digits[0][:5]
    expected = trained.head(trained.features(images) * trained.feature_scale)
    torch.testing.assert_close(trained(images), expected, rtol=1e-4, atol=1e-5)


def test_scale_travels_with_the_weights(trained, digits):
    copy = SmallClassifier(1, 10)
    copy.load_state_dict(trained.state_dict())
    images = digits[0][:5]
    assert torch.equal(extract_features(copy, images), extract_features(trained, images))


def test_bytes_and_floats_are_the_same_images(trained, digits):
    as_bytes = ((digits[0][:20] + 1) * 127.5).round().to(torch.uint8)
    as_floats = as_bytes.float() / 127.5 - 1
    assert torch.equal(extract_features(trained, as_bytes), extract_features(trained, as_floats))
    labels = digits[1][:20]
    first, second = _short(as_bytes, labels), _short(as_floats, labels)
    assert torch.equal(first.head.weight, second.head.weight)


def test_same_seed_same_weights_and_another_seed_others(digits):
    images, labels = digits[0][:64], digits[1][:64]
    first, again, other = _short(images, labels), _short(images, labels), _short(images, labels, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)


def test_global_random_state_is_neither_used_nor_changed(digits):
    images, labels = digits[0][:64], digits[1][:64]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = _short(images, labels, flip=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = _short(images, labels, flip=True)
    assert torch.equal(first.head.weight, second.head.weight)


def test_flip_changes_the_training(digits):
    images, labels = digits[0][:64], digits[1][:64]
    assert not torch.equal(_short(images, labels).head.weight, _short(images, labels, flip=True).head.weight)


def test_augmentation_only_shifts_and_mirrors():
    from lediflow.evaluation.features import _augment

    images = torch.arange(2 * 32 * 24, dtype=torch.float32).reshape(1, 2, 32, 24).repeat(200, 1, 1, 1)
    padded = F.pad(images[:1], (1,) * 4, mode="replicate")
    shifts = [padded[0, :, y : y + 32, x : x + 24] for y in range(3) for x in range(3)]
    for flip, expected in ((False, shifts), (True, shifts + [shift.flip(2) for shift in shifts])):
        moved = _augment(images, flip, torch.Generator().manual_seed(0))
        matches = torch.stack([(moved == one).flatten(1).all(1) for one in expected])
        assert matches.any(0).all(), "an image that is no shift of the original"
        assert matches.any(1).all(), "a shift that never happens"


def test_rgb_of_any_size_and_progress():
    images = torch.rand(12, 3, 8, 13, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen: list[tuple[int, int]] = []
    model = train_classifier(
        images,
        torch.arange(12) % 4,
        num_classes=4,
        seed=0,
        steps=2,
        flip=True,
        progress=lambda done, of: seen.append((done, of)),
    )
    assert seen == [(1, 2), (2, 2)]
    assert model(images).shape == (12, 4)


def test_distance_grows_with_degradation(trained, digits):
    train, held_out = digits[0][:TRAIN], digits[0][TRAIN:]
    reference = extract_features(trained, train)
    noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(0))
    # The same count and the same images throughout, so the real ones are the floor.
    floor = frechet_floor(reference, extract_features(trained, held_out), seed=0)

    def distance(images: Tensor) -> float:
        features = extract_features(trained, images.clamp(-1, 1))
        return frechet_at_count(features, reference, count=len(held_out), seed=0)

    blurred = F.avg_pool2d(held_out, 3, stride=1, padding=1)
    twice = F.avg_pool2d(blurred, 3, stride=1, padding=1)
    pale, paler = ((held_out + 1) * share - 1 for share in (0.8, 0.5))
    for worse in (
        [distance(held_out + level * noise) for level in (0.3, 0.6, 1.2)],
        [distance(blurred), distance(twice)],
        [distance(pale), distance(paler)],
    ):
        assert [floor, *worse] == sorted([floor, *worse])
        assert worse[-1] > 5 * floor


@pytest.mark.parametrize(
    ("images", "labels", "classes", "message"),
    [
        (torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long), 1, "fewer than 2 classes"),
        (torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long), 3, "fewer than 2 classes"),
        (torch.zeros(4, 1, 8, 8), torch.arange(4), 3, "0..2"),
        (torch.zeros(4, 1, 8, 8), torch.arange(4) - 1, 4, "from -1"),
        (torch.zeros(4, 1, 8, 8), torch.arange(3), 3, "labels"),
        (torch.zeros(4, 8, 8), torch.arange(4), 4, "N, C, H, W"),
        (torch.zeros(4, 2, 8, 8), torch.arange(4), 4, "1 or 3 channels"),
        (torch.zeros(4, 1, 7, 8), torch.arange(4), 4, "at least 8"),
    ],
)
def test_mistakes_in_training_data(images, labels, classes, message):
    with pytest.raises(UserError, match=message):
        train_classifier(images, labels, num_classes=classes, seed=0, steps=1)


def test_mistakes_in_use(trained):
    with pytest.raises(UserError, match="at least 1"):
        train_classifier(torch.zeros(4, 1, 8, 8), torch.arange(4), num_classes=4, seed=0, steps=0)
    with pytest.raises(UserError, match="at least 2 classes"):
        SmallClassifier(1, 1)
    with pytest.raises(UserError, match="no images"):
        extract_features(trained, torch.zeros(0, 1, 16, 16))
    with pytest.raises(UserError, match="takes images"):
        extract_features(trained, torch.zeros(1, 3, 16, 16))
    with pytest.raises(UserError, match="one label for each image"):
        accuracy(trained, torch.zeros(2, 1, 16, 16), torch.zeros(1))
