import math

import pytest
import torch
from conftest import batch_of as served
from conftest import refused, stage_of, step_noise

from lediflow.sources import BatchNoise
from lediflow.training.augmentation import Augmentation, shift, turn_hue
from lediflow.training.settings import AugmentConfig


def noise_of(batch_size, positions=None):
    positions = positions or range(batch_size)
    return BatchNoise(3, batch_size=batch_size, positions=positions, device=torch.device("cpu"))


def batch_of(count, channels=3):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(count, channels, 8, 8, generator=generator) * 2 - 1
    return {"image": image, "flipped": torch.arange(count) % 2 == 1, "index": torch.arange(count)}


def test_a_shift_moves_whole_pixels_and_repeats_the_edge():
    y = torch.arange(16.0).view(1, 1, 4, 4)
    moved = shift(y, torch.tensor([1]), torch.tensor([-2]))
    assert moved[0, 0].tolist() == [[2, 3, 3, 3], [2, 3, 3, 3], [6, 7, 7, 7], [10, 11, 11, 11]]


def test_a_third_of_the_circle_turns_red_into_green_and_greys_stay():
    red, grey = torch.tensor([1.0, 0, 0]), torch.full((3,), 0.3)
    y = torch.stack((red, grey)).view(2, 3, 1, 1)
    turned = turn_hue(y, torch.full((2,), 2 * math.pi / 3)).view(2, 3)
    torch.testing.assert_close(turned, torch.stack((torch.tensor([0, 1.0, 0]), grey)), atol=1e-6, rtol=0)


def test_the_network_is_told_what_was_done_and_the_rest_stays_as_it_is():
    batch = batch_of(64)
    found = Augmentation(AugmentConfig(share=0.5, shift=0.25, hue=0.1))(batch, noise_of(64))
    told, changed = found["augmentation"], found["changed"]
    assert 16 < int(changed.sum()) < 48
    assert torch.equal(found["image"][~changed], batch["image"][~changed])
    assert not told[~changed, 1:].any() and told[changed, 1:].abs().max() <= 1
    assert torch.equal(told[:, 0], batch["flipped"].float())
    differs = (found["image"] != batch["image"]).flatten(1).any(1)
    assert torch.equal(differs, changed)


def test_what_happens_to_a_picture_does_not_depend_on_the_parts():
    augment, batch = Augmentation(AugmentConfig(share=0.5)), batch_of(8)
    whole = augment(batch, noise_of(8))
    part = augment({name: value[4:] for name, value in batch.items()}, noise_of(8, range(4, 8)))
    for name in ("image", "augmentation", "changed"):
        assert torch.equal(whole[name][4:], part[name])


def test_grey_pictures_have_no_hue():
    batch = batch_of(16, channels=1)
    found = Augmentation(AugmentConfig(share=1, shift=0, hue=0.5))(batch, noise_of(16))
    assert torch.equal(found["image"], batch["image"])


@pytest.mark.parametrize(("stage", "told"), [("flow", False), ("sampler", True), ("baseline", True)])
def test_those_who_cannot_see_it_are_told(digits, stage, told):
    found = stage_of(digits, stage, "data.augment={share: 0.5}")
    batch, noise = served(digits), step_noise()
    pairs = found.coupling.pairs(found.augment(batch, noise), noise)
    assert ("augmentation" in pairs.conditions) == told
    loss, _ = found.learn(found.network, batch, noise)
    assert loss.isfinite()


def test_the_posterior_is_that_of_the_changed_picture(digits):
    stage = stage_of(digits, "sampler", "data.augment={share: 0.5}")
    batch = stage.augment(served(digits), step_noise())
    assert batch["changed"].any() and not batch["changed"].all()
    expected = stage.coupling.auxiliary.encode(batch["image"])
    torch.testing.assert_close(stage.coupling.posteriors.of(batch).mean, expected.mean)


def test_codec_latents_are_not_augmented(lediflow):
    result = lediflow("train", "ffhq-256-sdv", "--data", "x", "--set", "data.augment={share: 0.5}")
    refused(result, "data.augment changes pixels")
