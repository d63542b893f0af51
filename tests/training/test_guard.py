"""Bad losses: one is skipped, several in a row lead back, and what cannot be mended stops."""

import json
import math
import random

import pytest
import torch
from conftest import TINY

from lediflow.errors import UserError
from lediflow.training import checkpoint
from lediflow.training.config import load_config
from lediflow.training.guard import PATIENCE, ROLLBACKS, WINDOW, Guard
from lediflow.training.objectives import Matching
from lediflow.training.run import train

CONFIG = load_config("digits", [*TINY, "training.checkpoint_every=2", "training.log_every=1"])


def test_only_what_is_unusual_is_a_fault():
    guard, usual = Guard(), random.Random(0)
    assert guard.judge(1e9, 1.0, spike=50) == "", "nothing is unusual at first"
    for _ in range(WINDOW):
        assert guard.judge(usual.gauss(-1.0, 0.1), 1.0, spike=50) == ""
    assert guard.judge(-5.0, 1.0, spike=50) == "", "a low loss is good news"
    assert "leaps to 9" in guard.judge(9.0, 1.0, spike=50)
    assert "not finite" in guard.judge(math.nan, 1.0, spike=50)
    assert "not finite" in guard.judge(-1.0, math.inf, spike=0)
    assert (guard.bad, guard.skipped) == (3, 3)
    assert guard.judge(9.0, 1.0, spike=0) == ""
    assert (guard.bad, guard.skipped) == (0, 3)
    assert len(guard.losses) == WINDOW


def test_a_constant_loss_does_not_make_noise_a_leap():
    guard = Guard()
    for _ in range(WINDOW):
        guard.judge(0.02, 1.0, spike=50)
    assert guard.judge(0.0201, 1.0, spike=50) == ""


def test_state_survives_json():
    guard = Guard()
    for i in range(WINDOW + 5):
        guard.judge(1 / (i + 3), 1.0, spike=50)
    assert Guard(**json.loads(json.dumps(guard.to_dict()))) == guard


def test_the_full_rate_returns_beyond_the_failure():
    guard = Guard(skipped=5).after_rollback(Guard(), step=40)
    assert (guard.rate, guard.attempt, guard.skipped) == (0.5, 1, 5)
    guard.saving(40)
    assert guard.rate == 0.5
    again = guard.after_rollback(Guard(), step=30)
    assert (again.rate, again.attempt, again.failed_at) == (0.25, 2, 40)
    again.saving(41)
    assert (again.rate, again.attempt) == (1.0, 2)


def break_losses(monkeypatch, broken):
    """Make the loss NaN in the n-th call of the baseline's loss (from 1) where `broken(n)`."""
    calls, whole = [], Matching.loss

    def loss(self, *arguments):
        calls.append(1)
        value, metrics = whole(self, *arguments)
        return (value * math.nan if broken(len(calls)) else value), metrics

    monkeypatch.setattr(Matching, "loss", loss)
    return calls


def records(run):
    return [json.loads(line) for line in (run / "baseline" / "metrics.jsonl").read_text().splitlines()]


def test_one_bad_step_is_skipped_and_counted(tmp_path, monkeypatch, capsys):
    break_losses(monkeypatch, lambda n: n == 3)
    run = train(CONFIG, tmp_path / "run", device="cpu", stages=["baseline"])
    assert [record["skipped"] for record in records(run)] == [0, 0, 1, 1, 1, 1]
    assert [record["loss"] is None for record in records(run)] == [False, False, True, False, False, False]
    assert "baseline step 3: the loss (nan)" in capsys.readouterr().err
    tensors = checkpoint.load_tensors(run / "baseline" / "checkpoints" / "step-6", "model.safetensors")
    assert all(torch.isfinite(t).all() for t in tensors.values())


def test_a_bad_place_is_passed_on_another_way(tmp_path, monkeypatch, capsys):
    """Steps 5 to 9 are bad at the first attempt: back to 4, then other images at half the rate."""
    config = CONFIG.model_copy(
        update={
            "training": CONFIG.training.model_copy(
                update={"baseline": CONFIG.training.baseline.model_copy(update={"steps": 12})}
            )
        }
    )
    calls = break_losses(monkeypatch, lambda n: 5 <= n < 5 + PATIENCE)
    run = train(config, tmp_path / "run", device="cpu", stages=["baseline"])
    assert len(calls) == 12 + PATIENCE
    assert "back to step 4" in capsys.readouterr().err
    rates = {record["step"]: record["learning_rate"] for record in records(run)}
    assert rates[5] == rates[10] == rates[4] / 2
    assert rates[11] == rates[4], "a checkpoint beyond step 9 was saved at step 10"
    assert records(run)[-1]["rollbacks"] == 1
    assert records(run)[-1]["skipped"] == PATIENCE


def test_what_cannot_be_mended_stops_with_the_checkpoint_intact(tmp_path, monkeypatch):
    calls = break_losses(monkeypatch, lambda n: n > 4)
    with pytest.raises(UserError, match=f"step 9.*not finite.*images are finite.*after {ROLLBACKS} returns"):
        train(
            load_config("digits", [*TINY, "training.checkpoint_every=2", "training.baseline.steps=20"]),
            tmp_path / "run",
            device="cpu",
            stages=["baseline"],
        )
    assert len(calls) == 4 + PATIENCE * (1 + ROLLBACKS)
    folder = tmp_path / "run" / "baseline" / "checkpoints"
    assert checkpoint.steps_on_disk(folder) == [2, 4]
    assert checkpoint.load_tensors(folder / "step-4", "model.safetensors")
