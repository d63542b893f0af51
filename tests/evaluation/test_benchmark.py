"""What the benchmark reports; how fast anything is, is not asserted."""

import json

import pytest
import torch
from typer.testing import CliRunner

from lediflow.cli.app import app
from lediflow.codecs import Codec
from lediflow.errors import UserError
from lediflow.evaluation import benchmark as b
from tests.conftest import TINY, tiny_codec_settings


@pytest.fixture(scope="module")
def report():
    pipeline = b.pipeline_of("digits", TINY)
    return b.benchmark(pipeline, device=torch.device("cpu"), batch_size=2, repeats=1)


def test_every_network_and_every_row_of_table_1_is_there(report):
    assert set(report["networks"]) == {"sampler", "decoder", "flow"}
    assert all(n["gflop"] >= 0 and n["ms_per_image"] > 0 for n in report["networks"].values())
    nfe = {(r["model"], r["solver"]): r["nfe"] for r in report["sampling"]}
    assert nfe == {
        ("flow matching", "midpoint"): {"flow": 16},
        ("LeDiFlow", "midpoint"): {"sampler": 8, "decoder": 1, "flow": 4},
        ("flow matching", "heun3"): {"flow": 24},
        ("LeDiFlow", "heun3"): {"sampler": 6, "decoder": 1, "flow": 3},
    }
    assert set(report["speedup"]) == {"midpoint", "heun3"}
    assert report["training"]["peak_memory_gb"] > 0
    json.dumps(report)


def test_one_evaluation_has_a_row_beside_eight_midpoint_steps(report):
    assert "mean" not in report["speedup"], "this preset has no average velocity"
    settings = [*TINY, "training.stages=[auxiliary,flow,sampler,meanflow]"]
    pipeline = b.pipeline_of("digits", settings)
    assert (pipeline.flow.average_velocity, pipeline.sampler.average_velocity) == (True, False)
    assert not b.baseline_of(pipeline).flow.average_velocity
    refined = b.pipeline_of("digits", TINY, average_velocity=True)
    found = b.benchmark(refined, device=torch.device("cpu"), batch_size=2, repeats=1, training=False)
    rows = {(r["model"], r["solver"]): r for r in found["sampling"]}
    one, eight = rows["LeDiFlow", "mean"], rows["flow matching", "midpoint"]
    assert one["nfe"] == {"sampler": 1, "decoder": 1, "flow": 1}
    assert rows["LeDiFlow", "midpoint"]["nfe"] == {"sampler": 8, "decoder": 1, "flow": 4}
    assert set(one["ms"]) == {"sampler", "decoder", "flow"}
    ratio = eight["ms_per_image"] / one["ms_per_image"]
    assert found["speedup"]["mean"] == pytest.approx(ratio, abs=0.01)


def test_the_split_is_evaluations_times_one_evaluation(report):
    one = {name: n["ms_per_image"] for name, n in report["networks"].items()}
    for row in report["sampling"]:
        for name, ms in row["ms"].items():
            assert ms == pytest.approx(row["nfe"][name] * one[name], abs=1e-3)


def test_backends_are_named_by_grid(monkeypatch):
    pipeline = b.pipeline_of("digits", [*TINY, "data.image_size=64", "auxiliary.latent_size=16"])
    assert b.attention_backends(pipeline.flow, torch.device("cpu")) == {"32x32": "tiles", "16x16": "global"}
    monkeypatch.setenv("LEDIFLOW_ATTENTION", "dense")
    assert b.attention_backends(pipeline.flow, torch.device("cpu"))["32x32"] == "dense"


def test_a_trained_model_is_timed_beside_an_equal_network_without_z(tiny_run):
    pipeline = b.pipeline_of(str(tiny_run))
    baseline = b.baseline_of(pipeline)
    assert baseline.flow.config.widths == pipeline.flow.config.widths
    assert baseline.flow.config.latent_channels == 0


def test_a_codec_is_timed_as_a_network_and_left_out_of_the_rows(tiny_codec):
    pipeline = b.pipeline_of("digits", tiny_codec_settings(tiny_codec, "unused"))
    codec = Codec.load(tiny_codec)
    report = b.benchmark(
        pipeline, codec=codec, device=torch.device("cpu"), batch_size=1, repeats=1, training=False
    )
    assert report["networks"]["codec"]["gflop"] > 0
    assert report["networks"]["codec"]["parameters"] == sum(p.numel() for p in codec.model.parameters())
    assert all("codec" not in row["nfe"] for row in report["sampling"])
    assert "training" not in report


def test_mistakes(tiny_run):
    with pytest.raises(UserError, match="--set changes a preset"):
        b.pipeline_of(str(tiny_run), ["data.image_size=8"])
    with pytest.raises(UserError, match="--average-velocity changes a preset"):
        b.pipeline_of(str(tiny_run), average_velocity=True)
    with pytest.raises(UserError, match="plain flow matching"):
        b.pipeline_of(str(tiny_run / "baseline"))
    with pytest.raises(UserError, match="did you mean 'digits'"):
        b.pipeline_of("digit")


def test_peak_memory_sees_what_was_held():
    with b.peak_memory(torch.device("cpu")) as before:
        torch.zeros(1).sum()
        import time

        time.sleep(0.02)
    with b.peak_memory(torch.device("cpu")) as peak:
        held = torch.ones(50_000_000)
        time.sleep(0.02)
    assert peak[0] - before[0] > 0.9 * held.numel() * 4


def test_command_line(monkeypatch):
    monkeypatch.delenv("LEDIFLOW_ATTENTION", raising=False)
    settings = [x for s in TINY for x in ("--set", s)]
    options = ["--batch-size", "1", "--repeats", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, ["benchmark", "digits", "--average-velocity", *options, *settings])
    assert result.exit_code == 0, result.output
    assert "LeDiFlow takes 1/" in result.output
    assert "of the time (one mean step against 8 midpoint steps)" in result.output
    assert "| 1 mean step" in result.output
    result = CliRunner().invoke(app, ["benchmark", "digits", "--dtype", "bf61"])
    assert isinstance(result.exception, UserError)
    assert "did you mean 'bf16'" in str(result.exception)
