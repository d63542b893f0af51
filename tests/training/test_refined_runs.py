"""Runs that refine what is trained: resumed, cut into parts, and refused where it does not fit."""

import json
import shutil

import pytest
import torch
from conftest import REFINING, TINY, weights

from lediflow.errors import UserError
from lediflow.training import checkpoint
from lediflow.training.config import load_config
from lediflow.training.run import check_shards, train
from lediflow.training.stages import STAGES


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
    half = [f"training.{name.replace('-', '_')}.steps=3" for name in REFINING]
    # the last one learns from another of them, which must be finished first
    for stages in REFINING[:-1], REFINING[-1:]:
        train(load_config("digits", TINY + half), run, stages=stages, device="cpu")
        made = _pairs(run)
        train(load_config("digits", TINY), run, stages=stages, device="cpu")
        assert made and _pairs(run) == made
    for name in REFINING:
        ours, theirs = weights(run, name), weights(tiny_mean_run, name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def _pairs(run):
    return {path: path.stat().st_mtime_ns for path in run.glob("*distill/pairs/*")}


def test_refining_changes_the_weights_that_it_starts_from(tiny_mean_run):
    for name in REFINING:
        ours, theirs = weights(tiny_mean_run, name), weights(tiny_mean_run, STAGES[name].starts_from)
        added = {"interval_in.weight", "interval_features.frequencies"}
        assert set(ours) == set(theirs) | added
        moved = max((ours[key] - theirs[key]).abs().max().item() for key in theirs)
        assert 0 < moved < 0.01, f"{name}: six steps are few"
        assert ours["interval_in.weight"].abs().max() > 0


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
    for name in ("meanflow", "sampler-meanflow", "baseline-meanflow"):
        with pytest.raises(UserError, match=f"{name} does not work with training.parallel=fsdp"):
            check_shards(config, [STAGES[name]], 2)
        check_shards(config, [STAGES[name]], 1)
        check_shards(load_config("digits"), [STAGES[name]], 2)
    check_shards(config, [STAGES["distill"], STAGES["flow"]], 2)
