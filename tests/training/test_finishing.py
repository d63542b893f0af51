"""When a stage counts as finished, and what happens when its number of steps changes or a compiler fails."""

import json
import os
import signal

import pytest
import torch
from conftest import TINY, weights

from lediflow.errors import UserError
from lediflow.networks.model import Network
from lediflow.training import checkpoint
from lediflow.training.config import load_config
from lediflow.training.objectives import Elbo
from lediflow.training.run import train
from lediflow.training.run_pipelines import finished_stages, last_checkpoint
from lediflow.training.signals import stop_signals
from lediflow.training.trainer import Interrupted

EVERY = "training.checkpoint_every=1"


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A run whose auxiliary stage was stopped after step 4 of 6."""
    loss = Elbo.loss
    steps = []

    def stopping(self, model, batch, noise):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, model, batch, noise)

    monkeypatch.setattr(Elbo, "loss", stopping)
    with pytest.raises(Interrupted, match="everything is saved"):
        train(load_config("digits", TINY), tmp_path / "run", stages=["auxiliary"], device="cpu")
    monkeypatch.undo()
    return tmp_path / "run"


def test_nothing_is_built_on_an_unfinished_stage(interrupted):
    reached = checkpoint.steps_on_disk(interrupted / "auxiliary" / "checkpoints")[-1]
    assert reached < 6
    assert finished_stages(interrupted) == []
    with pytest.raises(UserError, match=rf"stage auxiliary is not finished \(step-{reached}\)"):
        train(load_config("digits", TINY), interrupted, stages=["flow"], device="cpu")


def test_a_stage_that_is_shortened_is_finished_where_it_stands(interrupted):
    """Its statistics of z are measured, which everything after it relies on."""
    short = load_config("digits", [*TINY, "training.auxiliary.steps=3"])
    train(short, interrupted, stages=["auxiliary"], device="cpu")
    assert finished_stages(interrupted) == ["auxiliary"]
    found = weights(interrupted, "auxiliary")
    assert not torch.equal(found["z_std"], torch.ones(1, 4, 1, 1))
    train(short, interrupted, stages=["flow"], device="cpu")


def test_a_finished_cosine_schedule_is_not_extended(tmp_path):
    cosine = [*TINY, "training.baseline.schedule=cosine"]
    train(load_config("digits", cosine), tmp_path / "run", stages=["baseline"], device="cpu")
    longer = load_config("digits", [*cosine, "training.baseline.steps=8"])
    with pytest.raises(
        UserError, match=r"ended at step 6, where its cosine schedule.*training.baseline.steps=6"
    ):
        train(longer, tmp_path / "run", stages=["baseline"], device="cpu")
    again = train(longer, tmp_path / "run", stages=["baseline"], device="cpu", resume=False)
    assert json.loads((last_checkpoint(again, "baseline") / "state.json").read_text())["finished"]


def test_a_compiler_that_fails_costs_a_sentence_not_the_run(tmp_path, monkeypatch, capsys):
    plain = train(load_config("digits", TINY), tmp_path / "plain", stages=["baseline"], device="cpu")

    def broken(graph, inputs):
        raise RuntimeError("no such instruction")

    compile_as = Network.compile_as
    monkeypatch.setattr(Network, "compile_as", lambda self, how: compile_as(self, how, backend=broken))
    compiled = load_config("digits", [*TINY, "training.compile=model"])
    run = train(compiled, tmp_path / "run", stages=["baseline"], device="cpu")
    said = capsys.readouterr().err
    assert said.count("torch.compile failed") == 1
    assert "no such instruction" in said
    ours, theirs = weights(run, "baseline"), weights(plain, "baseline")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_second_signal_stops_at_once(capsys):
    with pytest.raises(KeyboardInterrupt), stop_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
    assert "press Ctrl-C again to stop at once" in capsys.readouterr().err
