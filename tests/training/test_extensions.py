"""What others add trains and samples like what is here: stages, a condition, a network of another kind."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, batch_of, stage_of, step_noise, weights
from toy_network import ToyBlock, ToyNetwork, build_toy

from lediflow import fields, ode
from lediflow.networks.velocity import VelocityTransformer
from lediflow.pipelines.load import load_pipeline
from lediflow.training.builders import NETWORKS
from lediflow.training.card import run_report, summary
from lediflow.training.config import load_config, load_run_config
from lediflow.training.couplings import COUPLINGS, Coupling
from lediflow.training.run import train
from lediflow.training.run_pipelines import RUN_PIPELINES, RunPipeline, load_network
from lediflow.training.settings import CoupledStageConfig, FlowStageConfig, SourceMeanFlowStageConfig
from lediflow.training.stages import STAGES, StageSpec


@pytest.fixture
def registered(monkeypatch):
    """Add rows and couplings to the tables, until the test ends."""

    def register(*rows, couplings=(), pipelines=()):
        for row in rows:
            monkeypatch.setitem(STAGES, row.name, row)
        for coupling in couplings:
            monkeypatch.setitem(COUPLINGS, coupling.name, coupling)
        RUN_PIPELINES.extend(pipelines)

    before = list(RUN_PIPELINES)
    yield register
    RUN_PIPELINES[:] = before


def settings_of(section, *settings):
    return [f"training.{section}.{setting}" for setting in settings]


# A stage: a coupling and a row


class Negatives(Coupling):
    """x ~ N(0, 1), y an image with light for dark."""

    name = "negatives"

    def targets(self, batch, noise):
        return -batch["image"], self.labels(batch["label"])

    def preview(self, carry):
        return [carry(self.preview_noise(), self.preview_labels(), 4)]


def test_a_coupling_and_a_row_are_a_stage(registered, digits, tmp_path):
    """Settings, training, resuming, pipeline, summary and card, by what the tables say alone."""
    first = StageSpec(
        "negatives",
        learns="dark digits on white",
        settings=CoupledStageConfig,
        network="baseline",
        coupling="negatives",
        objective="matching",
    )
    refined = StageSpec(
        "negatives-meanflow",
        learns="the same in one evaluation",
        settings=SourceMeanFlowStageConfig,
        network="baseline",
        coupling="negatives",
        objective="average-velocity",
        starts_from="negatives",
    )
    pipelines = [
        RunPipeline(row.name, "FlowMatchingPipeline", {"flow": (row.name,)}) for row in (first, refined)
    ]
    registered(first, refined, couplings=[Negatives], pipelines=pipelines)
    config = load_config(
        "digits",
        [
            *TINY,
            *settings_of("negatives", "steps=60", "batch_size=32", "learning_rate=1e-2", "warmup_steps=5"),
            *settings_of("negatives", "coupling=optimal-transport"),
            *settings_of("negatives_meanflow", "steps=4", "batch_size=8"),
            "training.stages=[negatives, negatives-meanflow]",
        ],
    )
    run = train(config, tmp_path / "run", device="cpu")
    assert load_run_config(run) == config
    assert (run / "negatives" / "previews" / "step-000060.png").is_file()
    for name, nfe in (("negatives", 16), ("negatives-meanflow", 1)):
        assert f"next: lediflow sample {run / name} " in summary(run_report(run, config))
        assert f"| {name} | " in (run / "README.md").read_text()
        pipeline = load_pipeline(run / name)
        pipeline.set_progress_bar_config(disable=True)
        out = pipeline(32, output_type="pt")
        assert out.nfe == {"flow": nfe}
        assert digits.first(100).mean() < -0.2 < 0.2 < out.images.mean(), "light for dark"


# A condition: its name and its embedder in the config of a network


class Sharpen(Coupling):
    """x a blurred image and noise, y the image; the blurred one is a condition."""

    name = "sharpen"

    def targets(self, batch, noise):
        y = batch["image"]
        coarse = torch.nn.functional.avg_pool2d(y, 4)
        return y, self.labels(batch["label"]).also(image=coarse)

    def source(self, conditions, noise):
        blurred = conditions["image"].repeat_interleave(4, -1).repeat_interleave(4, -2)
        sigma = torch.ones_like(blurred)
        return blurred + sigma * noise, sigma

    def preview(self, carry):
        return [self.preview_targets()[0]]


def build_sharpener(config, *, average_velocity=False):
    channels, *size = config.sample_shape
    return VelocityTransformer(
        sample_size=size,
        in_channels=channels,
        conditions={"image": {"embedder": "grid", "channels": channels, "size": 4}},
        average_velocity=average_velocity,
        **config.flow.model_dump(exclude={"z_conditioning"}),
    )


def test_a_condition_of_ones_own_is_told_and_used(registered, monkeypatch, digits, tmp_path):
    """The start of an upsampler: x is drawn from a condition, as eq. 3 draws it from z."""
    monkeypatch.setitem(NETWORKS, "sharpener", build_sharpener)
    row = StageSpec(
        "sharpen",
        learns="blurred -> sharp",
        settings=FlowStageConfig,
        network="sharpener",
        coupling="sharpen",
        objective="matching",
    )
    registered(row, couplings=[Sharpen])
    settings = settings_of("sharpen", "steps=60", "batch_size=32", "learning_rate=1e-2", "warmup_steps=5")
    config = load_config("digits", [*TINY, *settings])
    run = train(config, tmp_path / "run", stages=["sharpen"], device="cpu")
    network = load_network(run, "sharpen", config)
    batch, stage = batch_of(digits, 64), stage_of(digits, "sharpen")
    pairs = stage.coupling.pairs(batch, step_noise(64))
    end = ode.integrate(fields.conditional(network, pairs.conditions), pairs.x, steps=4).end
    before, after = ((images - pairs.y).square().mean() for images in (pairs.x, end))
    assert after < 0.5 * before
    swapped = pairs.conditions.rows(torch.arange(63, -1, -1))
    other = ode.integrate(fields.conditional(network, swapped), pairs.x, steps=4).end
    assert (other - pairs.y).square().mean() > after, "the condition of the image is the one that helps"


# A network of another kind

STEPS = settings_of("baseline", "steps=12")
TOY = [*TINY, "data.classes=10", "training.log_every=1", *STEPS]


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(NETWORKS, "baseline", build_toy)


@pytest.fixture
def toy_run(toy, tmp_path):
    return train(load_config("digits", TOY), tmp_path / "toy", stages=["baseline"], device="cpu")


def test_another_network_trains_and_samples(toy_run):
    """With labels left out, guidance, averages and a pipeline that comes back from disk."""
    pipeline = load_pipeline(toy_run / "baseline")
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.flow, ToyNetwork)
    assert all(torch.equal(pipeline.flow.state_dict()[k], v) for k, v in weights(toy_run, "baseline").items())
    plain = pipeline(4, output_type="pt")
    assert plain.nfe == {"flow": 16} and plain.images.shape == (4, 1, 16, 16)
    guided = pipeline(4, output_type="pt", guidance=4.0)
    assert guided.nfe == {"flow": 32} and not torch.equal(guided.images, plain.images)


def test_another_network_has_groups_for_the_optimiser_and_units_for_shards():
    network = build_toy(load_config("digits", TOY))
    groups = network.parameter_groups(lr=1e-3, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(network.parameters()))
    assert decay[id(network.first.weight)] == 0.1
    assert decay[id(network.first.bias)] == decay[id(network.label.weight)] == 0
    assert {group["lr"] for group in groups} == {1e-3}
    assert [type(unit) for unit in network.shard_units()] == [ToyBlock, ToyBlock]


def test_another_network_learns_an_average_velocity_and_compiles(toy, digits):
    stage = stage_of(digits, "baseline-meanflow", "data.classes=10")
    assert isinstance(stage.network, ToyNetwork) and stage.network.average_velocity
    loss, metrics = stage.loss(stage.network, batch_of(digits), step_noise())
    loss.backward()
    assert metrics["correction"] > 0 and stage.network.times.weight.grad.abs().max() > 0
    x, t = torch.randn(3, 1, 16, 16), torch.rand(3)
    for how in ("blocks", "model"):
        compiled = copy.deepcopy(stage.network)
        compiled.compile_as(how, backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, t), stage.network(x, t))


@pytest.mark.slow
def test_two_processes_hold_shards_of_another_network_and_train_as_one(toy_run, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT / 'tests' / 'training')!r}]\n"
        "from toy_network import build_toy\n"
        "from lediflow.cli.app import main\n"
        "from lediflow.training import builders\n"
        "builders.NETWORKS['baseline'] = build_toy\n"
        "main()\n"
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    settings = [part for setting in (*TOY, "training.parallel=fsdp") for part in ("--set", setting)]
    command = ["train", "digits", "--output", str(tmp_path / "two"), "--stage", "baseline", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *launch, *command, *settings],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = weights(tmp_path / "two", "baseline"), weights(toy_run, "baseline")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
    assert isinstance(load_pipeline(tmp_path / "two" / "baseline").flow, ToyNetwork)
