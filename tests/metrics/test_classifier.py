from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lediflow.errors import UserError
from lediflow.metrics.classifier import SmallClassifier, _shifted, accuracy, train_classifier
from lediflow.metrics.frechet import frechet_distance

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
    return train_classifier(images.__getitem__, labels[:TRAIN], num_classes=10, seed=0, steps=150)


def _short(images: Tensor, labels: Tensor, seed: int = 0) -> SmallClassifier:
    read = images.__getitem__
    return train_classifier(read, labels, num_classes=10, seed=seed, steps=3, batch_size=16)


def test_learns_the_digits(trained, digits):
    images, labels = digits
    assert accuracy(trained, images[TRAIN:].__getitem__, labels[TRAIN:]) > 0.93


def test_accuracy_by_hand(trained, digits):
    guesses = trained(digits[0][:9]).argmax(1)
    labels = torch.where(torch.arange(9) < 3, (guesses + 1) % 10, guesses)
    assert accuracy(trained, digits[0].__getitem__, labels) == pytest.approx(6 / 9)


def test_images_are_read_a_batch_at_a_time(digits):
    images, labels = digits[0][:600], digits[1][:600]
    asked: list[Tensor] = []

    def read(indices: Tensor) -> Tensor:
        asked.append(indices)
        return images[indices]

    train_classifier(read, labels, num_classes=10, seed=0, steps=9, batch_size=100)
    assert max(map(len, asked)) == 512, "a batch of the features' scale is the largest"
    first_pass = torch.cat(asked[1:7])  # after the one image that tells the channels
    assert torch.equal(first_pass.sort().values, torch.arange(600)), "every image once before any twice"


def test_comes_back_frozen_and_in_evaluation_mode(trained):
    assert not trained.training
    assert not any(p.requires_grad for p in trained.parameters())


def test_size_of_the_network():
    assert 80_000 < sum(p.numel() for p in SmallClassifier(1, 10).parameters()) < 120_000


def test_features_are_scaled_by_the_training_set(trained, digits):
    features = trained.features(digits[0][:TRAIN])
    assert features.shape == (TRAIN, 64)
    assert features.var(dim=0).sum().item() == pytest.approx(64, rel=1e-4)


def test_logits_are_the_head_on_the_unscaled_features(trained, digits):
    images = digits[0][:5]
    expected = trained.head(trained.features(images) * trained.feature_scale)
    torch.testing.assert_close(trained(images), expected, rtol=1e-4, atol=1e-5)


def test_scale_travels_with_the_weights(trained, digits):
    copy = SmallClassifier(1, 10)
    copy.load_state_dict(trained.state_dict())
    images = digits[0][:5]
    assert torch.equal(copy.features(images), trained.features(images))


def test_bytes_and_floats_are_the_same_images(digits):
    as_bytes = ((digits[0][:20] + 1) * 127.5).round().to(torch.uint8)
    as_floats = as_bytes.float() / 127.5 - 1
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
    first = _short(images, labels)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = _short(images, labels)
    assert torch.equal(first.head.weight, second.head.weight)


def test_augmentation_only_shifts():
    images = torch.arange(2 * 32 * 24, dtype=torch.float32).reshape(1, 2, 32, 24).repeat(200, 1, 1, 1)
    padded = F.pad(images[:1], (1,) * 4, mode="replicate")
    shifts = [padded[0, :, y : y + 32, x : x + 24] for y in range(3) for x in range(3)]
    moved = _shifted(images, torch.Generator().manual_seed(0))
    matches = torch.stack([(moved == one).flatten(1).all(1) for one in shifts])
    assert matches.any(0).all(), "an image that is no shift of the original"
    assert matches.any(1).all(), "a shift that never happens"


def test_rgb_of_any_size_and_progress():
    images = torch.rand(12, 3, 8, 13, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen: list[int] = []
    model = train_classifier(
        images.__getitem__,
        torch.arange(12) % 4,
        num_classes=4,
        seed=0,
        steps=2,
        progress=lambda done, loss: seen.append(done),
    )
    assert seen == [1, 2]
    assert model(images).shape == (12, 4)


def test_distance_grows_with_degradation(trained, digits):
    train, held_out = digits[0][:TRAIN], digits[0][TRAIN:]
    reference = trained.features(train)
    noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(0))

    def distance(images: Tensor) -> float:
        return frechet_distance(trained.features(images.clamp(-1, 1)), reference)

    floor = distance(held_out)
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
        (torch.zeros(4, 2, 8, 8), torch.arange(4), 4, "1 or 3 channels"),
        (torch.zeros(4, 1, 7, 8), torch.arange(4), 4, "at least 8"),
    ],
)
def test_mistakes_in_training_data(images, labels, classes, message):
    with pytest.raises(UserError, match=message):
        train_classifier(images.__getitem__, labels, num_classes=classes, seed=0, steps=1)


def test_mistakes_in_use(trained):
    with pytest.raises(UserError, match="at least 1"):
        read = torch.zeros(4, 1, 8, 8).__getitem__
        train_classifier(read, torch.arange(4), num_classes=4, seed=0, steps=0)
    with pytest.raises(UserError, match="at least 2 classes"):
        SmallClassifier(1, 1)
    with pytest.raises(UserError, match="takes images"):
        trained.features(torch.zeros(1, 3, 16, 16))
