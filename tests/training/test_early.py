"""Worse networks for autoguidance that another training leaves behind."""

import shutil

import pytest
import torch
from conftest import TINY, weights

from lediflow.errors import UserError
from lediflow.pipelines.load import load_pipeline
from lediflow.training.config import load_config
from lediflow.training.rehearsal import rehearse
from lediflow.training.run import train

EARLY = [*TINY, "training.weak_flow.early=true", "training.weak_flow.steps=3"]
BOTH = ("flow", "weak-flow")


@pytest.fixture
def trained(tmp_path, tiny_run):
    """Train stages of a config, beside the tiny run's auxiliary model."""

    def trained(settings, *stages, name="run", **options):
        run = tmp_path / name
        if not (run / "auxiliary").exists():
            shutil.copytree(tiny_run / "auxiliary", run / "auxiliary")
        return train(load_config("digits", settings), run, device="cpu", stages=stages, **options)

    return trained


def same(ours, theirs):
    return all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_it_is_the_average_that_the_flow_had_then(trained):
    constant = "training.flow.schedule=constant"
    run = trained([*EARLY, constant], *BOTH)
    short = trained([*TINY, constant, "training.flow.steps=3"], "flow", name="short")
    assert same(weights(run, "weak-flow"), weights(short, "flow"))
    assert not same(weights(run, "weak-flow"), weights(run, "flow"))
    assert not (run / "weak-flow" / "metrics.jsonl").exists(), "nothing was trained"


def test_the_flow_is_as_it_would_be_without(trained, tiny_run):
    assert same(weights(trained(EARLY, *BOTH), "flow"), weights(tiny_run, "flow"))


def test_a_pipeline_is_guided_by_it(trained, tiny_run):
    run = trained(EARLY, *BOTH)
    shutil.copytree(tiny_run / "sampler", run / "sampler")
    pipe = load_pipeline(trained(EARLY, "sampler"))
    pipe.set_progress_bar_config(disable=True)
    plain, guided = (pipe(2, steps=1, autoguidance=w, output_type="pt") for w in (1, 2))
    assert guided.nfe["flow"] == 2 * plain.nfe["flow"]
    assert not torch.equal(plain.images, guided.images)


def test_a_run_that_was_stopped_after_it_resumes_with_it(trained):
    run = trained([*EARLY, "training.checkpoint_every=4", "training.keep_checkpoints=9"], *BOTH)
    kept, flow = weights(run, "weak-flow"), weights(run, "flow")
    shutil.rmtree(run / "flow" / "checkpoints" / "step-6")
    trained(EARLY, *BOTH)
    assert same(weights(run, "weak-flow"), kept) and same(weights(run, "flow"), flow)


def test_one_that_was_lost_is_made_again_with_the_flow(trained):
    run = trained(EARLY, *BOTH)
    kept = weights(run, "weak-flow")
    shutil.rmtree(run / "weak-flow")
    message = "no average of flow after 3 steps.*--no-resume and both --stage flow and --stage weak-flow"
    for stages in (BOTH, BOTH[1:]):
        with pytest.raises(UserError, match=message):
            trained(EARLY, *stages)
    with pytest.raises(UserError, match=message):
        trained(EARLY, "weak-flow", resume=False)
    trained(EARLY, *BOTH, resume=False)
    assert same(weights(run, "weak-flow"), kept)


@pytest.mark.parametrize("steps", [6, 7])
def test_one_that_is_not_earlier_is_refused(steps, trained):
    settings = [*EARLY, f"training.weak_flow.steps={steps}"]
    with pytest.raises(UserError, match=f"training.weak_flow.early.* step {steps}, and stage flow has 6"):
        trained(settings, *BOTH)


def test_a_rehearsal_counts_no_time_for_it():
    stages = rehearse(load_config("digits", EARLY), ["auxiliary", *BOTH], "cpu")["stages"]
    assert [stage.stage for stage in stages] == ["auxiliary", "flow"]


@pytest.mark.parametrize("name", ["sampler", "baseline"])
def test_sampler_and_baseline_leave_theirs(name, trained):
    section = f"training.weak_{name}"
    run = trained([*TINY, f"{section}.early=true", f"{section}.steps=2"], name, f"weak-{name}")
    assert not same(weights(run, f"weak-{name}"), weights(run, name))
