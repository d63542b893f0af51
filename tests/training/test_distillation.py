"""Distillation against its definition: pairs that the trained flow made, and a student that ends there."""

import pytest
import torch
from conftest import CPU, batch_of, digits_data, random_network, stage_of, step_noise

from lediflow import flow
from lediflow.conditions import Conditions
from lediflow.sources import BatchNoise, derive_seed, image_noise
from lediflow.training.distillation import PAIRS_PER_FILE, frequency_weights

CLASSES = "data.classes=10"


def distill(data, folder, *settings, name="distill"):
    """The stage with its pairs made; its student is neither its teacher nor still."""
    stage = stage_of(data, name, *settings)
    with torch.no_grad():
        for parameter in stage.network.parameters():
            parameter.mul_(0.5)
        stage.network.interval_in.weight.normal_(generator=torch.Generator().manual_seed(1))
    stage.make_pairs(folder, "a")
    stage.load_pairs()
    return stage


def by_midpoint(network, x, told, steps):
    """Where the flow carries x, step by step."""
    h = 1 / steps
    for i in range(steps):
        middle = x + h / 2 * network(x, torch.tensor(i * h), told)
        x = x + h * network(middle, torch.tensor((i + 0.5) * h), told)
    return x


def source_of(stage, told, numbers):
    """x = mu + temperature * sigma * noise, with the noise of each pair's number."""
    seed = derive_seed(0, stage.name)
    noise = image_noise((1, 16, 16), seed=seed, indices=numbers, stream="x")
    prior = stage.coupling.auxiliary.decode(told["z"])
    return prior.mean + stage.config.temperature * (prior.log_var / 2).exp() * noise


@pytest.mark.parametrize(("steps", "temperature"), [(1, 1.0), (4, 1.0), (4, 0.5)])
@torch.no_grad()
def test_pairs_are_where_the_trained_flow_carries_samples_of_the_prior(steps, temperature, digits, tmp_path):
    """At the temperature that the run's images are made at."""
    settings = (f"training.distill.teacher_steps={steps}", "training.distill.pairs=300", CLASSES)
    settings = (*settings, f"temperature={temperature}")
    stage = distill(digits, tmp_path, *settings)
    assert len(stage.ends) == 512, "300 pairs fill two files"
    numbers = [0, 7, 255, 256, 511]
    told = stage.conditions.rows(numbers)
    x, end = source_of(stage, told, numbers), stage.ends[numbers].float()
    teacher = random_network(stage.config, "flow")
    expected = by_midpoint(teacher, x, told, steps)
    scale = (expected - x).abs().mean()
    assert scale > 0.2, "the flow goes somewhere"
    assert (end - expected).abs().max() < 0.01 * scale + 2**-10 * expected.abs().max(), (
        "kept in half precision"
    )


def test_pairs_know_the_z_and_the_class_that_they_were_made_of(tmp_path):
    """z ~ q(z|y) of the images of a batch, mirrored or not."""
    data = digits_data(flip=True)
    stage = distill(data, tmp_path, CLASSES, "training.distill.pairs=8")
    batch = batch_of(data, PAIRS_PER_FILE, derive_seed(0, "distill", "pairs"))
    assert set(batch["flipped"].tolist()) == {True, False}
    with torch.no_grad():
        posterior = stage.coupling.auxiliary.encode(batch["image"])
    positions = range(PAIRS_PER_FILE)
    noise = BatchNoise(derive_seed(0, "distill"), batch_size=256, positions=positions, device=CPU)
    z = posterior.mean + (posterior.log_var / 2).exp() * noise.normal((4, 4, 4), "z")
    torch.testing.assert_close(stage.conditions["z"], z, rtol=1e-4, atol=1e-4)
    assert torch.equal(stage.conditions["label"], batch["label"])


def test_the_student_is_asked_to_end_where_the_flow_ends(digits, tmp_path):
    """Mean of (x + u(x, 0, 1) - end)^2 over the pairs that the step draws."""
    stage = distill(digits, tmp_path, "training.distill.pairs=300")
    batch = batch_of(digits)
    loss, metrics = stage.loss(stage.network, batch, step_noise())
    numbers = (step_noise().uniform("pair") * 512).long().tolist()
    assert len(set(numbers)) == 8
    told, end = stage.conditions.rows(numbers), stage.ends[numbers].float()
    with torch.no_grad():
        x = source_of(stage, told, numbers)
    u = stage.network(x, torch.zeros(8), told, torch.ones(8))
    torch.testing.assert_close(loss, (x + u - end).square().mean())
    assert metrics == {} and loss.requires_grad
    away, back = (flow.matching_loss(u, *ends).detach() for ends in ((x, end), (end, x)))
    assert (away - back).abs() > 0.2 * away, "the other direction is another loss"
    # the images are not looked at
    other = {**batch, "image": -batch["image"]}
    assert torch.equal(stage.loss(stage.network, other, step_noise())[0], loss)


# Errors of fine detail


def test_an_error_counts_more_where_images_have_less_power():
    """Waves of amplitude 3 along one axis and 1 along the other: power 9 to 1."""
    wave = 2 * torch.pi * torch.arange(16) / 16
    coarse, fine = torch.cos(wave)[:, None].expand(16, 16), torch.cos(5 * wave).expand(16, 16)
    images = (3 * coarse + fine).expand(4, 2, 16, 16)
    assert torch.equal(frequency_weights(images, 0.0), torch.ones(16, 16))
    for exponent in (0.5, 1.0):
        weights = frequency_weights(images, exponent)
        torch.testing.assert_close(weights[0, 5] / weights[1, 0], torch.tensor(9.0**exponent))
        torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
        assert weights.isfinite().all(), "where images have no power at all too"


def test_detail_weighs_the_loss_by_frequency(digits, tmp_path):
    """A student whose error is one wave, counted as that frequency is."""
    stage = distill(digits, tmp_path, "training.distill.pairs=300", "training.distill.detail=0.5")
    numbers = (step_noise().uniform("pair") * 512).long().tolist()
    end = stage.ends[numbers].float()
    wave = torch.cos(2 * torch.pi * 7 * torch.arange(16) / 16).expand(8, 1, 16, 16)
    loss, _ = stage.loss(lambda x, *_: end + wave - x, batch_of(digits), step_noise())
    weight = frequency_weights(stage.ends.float(), 0.5)[0, 7]
    assert abs(weight - 1) > 0.2
    torch.testing.assert_close(loss, 0.5 * weight, msg="a wave has a mean square of one half")


def test_a_student_that_ends_where_the_flow_ends_has_no_loss(digits, tmp_path):
    stage = distill(digits, tmp_path, "training.distill.pairs=8")

    def perfect(x, t, told, r):
        assert (t == 0).all() and (r == 1).all()
        with torch.no_grad():
            return by_midpoint(random_network(stage.config, "flow"), x, told, 4) - x

    loss, _ = stage.loss(perfect, batch_of(digits), step_noise())
    still, _ = stage.loss(lambda x, *_: 0 * x, batch_of(digits), step_noise())
    assert loss < 1e-4 * still and still > 0.1


def test_lost_pairs_are_made_again_and_those_of_another_teacher_replaced(digits, tmp_path):
    stage = distill(digits, tmp_path, "training.distill.pairs=300")
    first, second = sorted(tmp_path.iterdir())
    kept, lost = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    (tmp_path / f".00001-{'0' * 32}.safetensors").write_bytes(b"half")
    stage.make_pairs(tmp_path, "a")
    assert first.stat().st_mtime_ns == kept
    assert second.read_bytes() == lost
    assert sorted(tmp_path.iterdir()) == [first, second], "what a killed process left is cleared"
    second.write_bytes(lost[:100])
    stage.make_pairs(tmp_path, "a")
    assert second.read_bytes() == lost, "a damaged file is made again"
    stage.make_pairs(tmp_path, "b")
    assert first.stat().st_mtime_ns != kept


def test_processes_share_the_making(digits, tmp_path):
    stage = stage_of(digits, "distill", "training.distill.pairs=300")
    stage.make_pairs(tmp_path / "alone", "a")
    stage.make_pairs(tmp_path / "shared", "a", rank=1, world_size=2)
    assert [p.name for p in (tmp_path / "shared").iterdir()] == ["00001.safetensors"]
    stage.make_pairs(tmp_path / "shared", "a", rank=0, world_size=2)
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "shared" / path.name).read_bytes() == path.read_bytes()


def test_what_is_kept_is_small_and_named(digits, tmp_path):
    stage = distill(digits, tmp_path, CLASSES, "training.distill.pairs=8")
    assert stage.ends.dtype == torch.float16 and stage.ends.shape == (256, 1, 16, 16)
    assert isinstance(stage.conditions, Conditions) and set(stage.conditions) == {"z", "label"}


# The end of an average velocity

ENDS = ("training.meanflow_distill.pairs=8", "training.meanflow_distill.teacher_steps=4")
GUIDED = ("clusters.count=4", "clusters.networks=[flow]", "training.meanflow.guidance=[1,3]")


@torch.no_grad()
def test_an_average_velocity_is_followed_in_its_own_steps_at_the_strengths_it_has_learned(digits, tmp_path):
    stage = distill(digits, tmp_path, *GUIDED, *ENDS, name="meanflow-distill")
    assert stage.teacher.network.average_velocity
    numbers = [0, 7, 255]
    told = stage.conditions.rows(numbers)
    assert set(told) == {"z", "cluster", "guidance"}
    every = stage.conditions["guidance"]
    assert 1 <= every.min() < 1.3 and 2.7 < every.max() <= 3
    x, end = source_of(stage, told, numbers), stage.ends[numbers].float()
    teacher = random_network(stage.config, "meanflow")
    expected = x
    for i in range(4):
        t, r = torch.tensor(i / 4), torch.tensor((i + 1) / 4)
        expected = expected + 0.25 * teacher(expected, t, told, r)
    assert (end - expected).abs().max() < 0.01 * (expected - x).abs().mean() + 0.002 * expected.abs().max()
    assert stage.network.config.conditions["guidance"]["high"] == 3, "the student is told the same"
