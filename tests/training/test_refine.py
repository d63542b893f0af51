"""The stages that refine a flow to one evaluation: where they start, what they learn, what they keep."""

import json
import shutil

import pytest
import torch
from conftest import TINY, weights

from lediflow import flow
from lediflow.data.images import ImageData
from lediflow.errors import UserError
from lediflow.networks.hourglass import pair
from lediflow.pipelines.base import load_pipeline
from lediflow.sources import BatchNoise
from lediflow.training import checkpoint
from lediflow.training.config import load_config
from lediflow.training.refine import build_stage
from lediflow.training.run import _check_derivatives, load_network, train
from lediflow.training.stage_config import TEACHERS
from lediflow.training.stages import Latents

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return ImageData("digits", image_size=16, channels=1, flip=False)


def stage_of(run, digits, name, *settings):
    config = load_config("digits", [*TINY, *settings])
    latents = Latents(load_network(run, "auxiliary", config), digits, CPU)
    needs = None if name == "baseline-meanflow" else latents
    return build_stage(name, config, digits, CPU, needs, load_network(run, TEACHERS[name], config))


def batch_of(digits, count=8):
    from lediflow.data.batches import batches

    return next(batches(digits, batch_size=count, seed=0, stop=1))


def noise(count=8):
    return BatchNoise(3, batch_size=count, positions=range(count), device=CPU)


def test_a_run_has_a_pipeline_for_each_way_to_sample(tiny_mean_run, tiny_run):
    found = {
        folder: load_pipeline(tiny_mean_run / folder)
        for folder in (".", "flow", "distill", "baseline", "baseline-meanflow")
    }
    refined = {
        name: (p.flow.average_velocity, hasattr(p, "sampler") and p.sampler.average_velocity)
        for name, p in found.items()
    }
    assert refined == {
        ".": (True, True),
        "flow": (False, False),
        "distill": (True, True),
        "baseline": (False, False),
        "baseline-meanflow": (True, False),
    }
    assert found["."](2).nfe == {"sampler": 1, "decoder": 1, "flow": 1}
    assert found["flow"](2).nfe == {"sampler": 8, "decoder": 1, "flow": 4}
    assert found["baseline-meanflow"](2).nfe == {"flow": 1}
    # before refinement it is what the run gave
    expected = load_pipeline(tiny_run)(2, seed=1, output_type="pt").images
    assert torch.equal(found["flow"](2, seed=1, output_type="pt").images, expected)
    assert not (tiny_run / "flow" / "pipeline").exists()
    card = (tiny_mean_run / "README.md").read_text()
    assert "| sampler-meanflow |" in card


def test_any_solver_works_with_an_average_velocity(tiny_mean_run):
    pipe = load_pipeline(tiny_mean_run)
    out = pipe(2, solver="midpoint", steps=2, latent_solver="heun3", latent_steps=1)
    assert out.nfe == {"sampler": 3, "decoder": 1, "flow": 4}
    assert pipe(2, steps=4).nfe == {"sampler": 1, "decoder": 1, "flow": 4}


def test_mean_without_average_velocity_says_what_to_train(tiny_run):
    with pytest.raises(UserError, match="--stage meanflow"):
        load_pipeline(tiny_run)(1, solver="mean")
    with pytest.raises(UserError, match="--stage sampler-meanflow"):
        load_pipeline(tiny_run)(1, latent_solver="mean")


@pytest.mark.parametrize("name", TEACHERS)
def test_a_refined_network_starts_as_its_teacher(name, tiny_run, digits):
    stage = stage_of(tiny_run, digits, name)
    teacher = load_network(tiny_run, TEACHERS[name], stage.config)
    shape = stage.network.config.in_channels, *pair(stage.network.config.sample_size)
    x, t = torch.randn(2, *shape), torch.tensor([0.2, 0.7])
    z = torch.randn(2, *stage.network.latent_shape) if stage.network.latent_conditioning else None
    torch.testing.assert_close(stage.network(x, t, z, r=torch.ones(2)), teacher(x, t, z))


def test_meanflow_learns_v_plus_the_correction(tiny_run, digits):
    """The loss against its definition, from the same draws."""
    stage = stage_of(tiny_run, digits, "meanflow", "training.meanflow.error_power=0")
    batch = batch_of(digits)
    torch.nn.init.normal_(stage.network.interval_in.weight, generator=torch.manual_seed(0))
    pairs = stage.pairs(batch, noise())
    t, r, moving = flow.draw_intervals(
        noise().times(), noise().uniform("r"), range(8), equal_share=0.5, end_share=0.25
    )
    v, point = flow.velocity(pairs.x, pairs.y), flow.phi(pairs.x, pairs.y, t)
    correction = flow.average_velocity_correction(
        lambda x, t: stage.network(x, t, pairs.z, None, r), point, v, t, r
    )
    assert correction.abs().max() > 1e-3
    u = stage.network(point, t, pairs.z, None, r)
    loss, metrics = stage.loss(stage.network, batch, noise())
    expected = ((u - v - correction).square() / pairs.sigma.clamp_min(1e-3)).mean()
    torch.testing.assert_close(loss, expected)
    rms = (correction[moving].square().mean() / v[moving].square().mean()).sqrt()
    torch.testing.assert_close(metrics["correction"], rms)


def test_a_compiled_correction_is_the_same(tiny_run, digits):
    """The derivative in forward mode has a compiled graph of its own, without breaks."""
    losses = {}
    for how in ("none", "model"):
        stage = stage_of(tiny_run, digits, "meanflow", f"training.compile={how}")
        torch.nn.init.normal_(stage.network.interval_in.weight, generator=torch.manual_seed(0))
        torch._dynamo.utils.counters.clear()
        losses[how], metrics = stage.loss(stage.network, batch_of(digits), noise())
        assert metrics["correction"] > 1e-3
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] == 1
    assert not counted["graph_break"]
    torch.testing.assert_close(losses["model"], losses["none"])


def test_the_target_has_no_gradient(tiny_run, digits):
    """Only u is learned: the gradient is that of a regression on a constant."""
    stage = stage_of(
        tiny_run, digits, "baseline-meanflow", "training.baseline_meanflow.error_power=0",
        "training.baseline_meanflow.equal_share=0", "training.baseline_meanflow.end_share=1",
    )  # fmt: skip
    batch = batch_of(digits)
    stage.network.train()
    loss, _ = stage.loss(stage.network, batch, noise())
    loss.backward()
    pairs, t = stage.pairs(batch, noise()), noise().times()
    point, v, r = flow.phi(pairs.x, pairs.y, t), flow.velocity(pairs.x, pairs.y), torch.ones(8)
    correction = flow.average_velocity_correction(
        lambda x, t: stage.network(x, t, None, None, r), point, v, t, r
    )
    target = v + correction
    parameter = stage.network.patch_out.proj.weight
    expected = torch.autograd.grad(
        (stage.network(point, t, None, None, r) - target).square().mean(), parameter
    )
    torch.testing.assert_close(parameter.grad, expected[0])


@pytest.mark.parametrize(
    "setting", ["training.accumulate=2", "training.gradient_checkpointing=true"], ids=["parts", "recomputed"]
)
def test_parts_and_checkpointing_change_nothing(setting, tiny_run, tiny_mean_run, tmp_path):
    for stage in ("auxiliary", "flow"):
        shutil.copytree(tiny_run / stage, tmp_path / "run" / stage)
    run = train(load_config("digits", [*TINY, setting]), tmp_path / "run", stages=["meanflow"], device="cpu")
    ours, theirs = weights(run, "meanflow"), weights(tiny_mean_run, "meanflow")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_resumed_equals_uninterrupted(tiny_run, tiny_mean_run, tmp_path):
    shutil.copytree(tiny_run, run := tmp_path / "run")
    half = [f"training.{name.replace('-', '_')}.steps=3" for name in TEACHERS]
    train(load_config("digits", TINY + half), run, stages=TEACHERS, device="cpu")
    made = {p.name: p.stat().st_mtime_ns for p in (run / "distill" / "pairs").iterdir()}
    train(load_config("digits", TINY), run, stages=TEACHERS, device="cpu")
    assert {p.name: p.stat().st_mtime_ns for p in (run / "distill" / "pairs").iterdir()} == made
    for name in TEACHERS:
        ours, theirs = weights(run, name), weights(tiny_mean_run, name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def test_pairs_are_where_the_flow_ends_and_lost_ones_are_made_again(tiny_mean_run, digits, tmp_path):
    stage = stage_of(tiny_mean_run, digits, "distill")
    stage.make_pairs(tmp_path, "a")
    stage.load_pairs()
    assert len(stage.kept["z"]) == 512, "300 pairs fill two files"
    numbers = [0, 300]
    z = stage.kept["z"][numbers]
    x = stage.auxiliary.decode(z).at(stage._noise("x", (1, 16, 16), numbers))
    expected = stage.ends(x, z, None)  # of a student that is still the teacher, by the mean: one Euler step
    assert stage.kept["end"].shape == (512, 1, 16, 16)
    assert (stage.kept["end"][numbers].float() - expected[2]).abs().max() < 0.2

    first, second = sorted(tmp_path.iterdir())
    kept, lost = first.stat().st_mtime_ns, second.read_bytes()
    second.unlink()
    stage.make_pairs(tmp_path, "a")
    assert first.stat().st_mtime_ns == kept
    assert second.read_bytes() == lost
    stage.make_pairs(tmp_path, "b")
    assert first.stat().st_mtime_ns != kept, "pairs of another teacher are replaced"


def test_from_scratch_needs_no_trained_flow(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "auxiliary", tmp_path / "run" / "auxiliary")
    scratch = [*TINY, "training.meanflow.from_scratch=true"]
    run = train(load_config("digits", scratch), tmp_path / "run", stages=["meanflow"], device="cpu")
    assert "flow" not in checkpoint.load_state(run / "meanflow" / "checkpoints" / "step-6")
    lines = [json.loads(line) for line in (run / "meanflow" / "metrics.jsonl").read_text().splitlines()]
    assert {"error", "correction"} <= lines[-1].keys()


def test_what_is_missing_or_does_not_fit_is_named(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "auxiliary", tmp_path / "a" / "auxiliary")
    with pytest.raises(UserError, match="no trained flow stage yet"):
        train(load_config("digits", TINY), tmp_path / "a", stages=["meanflow"], device="cpu")
    for stage in ("auxiliary", "flow"):
        shutil.copytree(tiny_run / stage, tmp_path / "b" / stage)
    wider = load_config("digits", [*TINY, "flow.widths=[16,24]"])
    with pytest.raises(UserError, match="does not fit the config"):
        train(wider, tmp_path / "b", stages=["meanflow"], device="cpu")


def test_a_meanflow_of_another_flow_is_refused(tiny_mean_run, tmp_path):
    shutil.copytree(tiny_mean_run, run := tmp_path / "run")
    longer = load_config("digits", [*TINY, "training.flow.steps=8"])
    train(longer, run, stages=["flow"], device="cpu")
    with pytest.raises(UserError, match="another flow.*--no-resume"):
        train(longer, run, stages=["meanflow"], device="cpu")


def test_shards_are_refused_where_a_derivative_would_cross_them():
    config = load_config("digits", ["training.parallel=fsdp"])
    with pytest.raises(UserError, match="meanflow does not work with training.parallel=fsdp"):
        _check_derivatives(config, ["meanflow"], 2)
    _check_derivatives(config, ["distill"], 2)
    _check_derivatives(config, ["meanflow"], 1)
