"""What the benchmark reports; how fast anything is, is not asserted."""

import json

import pytest
import torch
from typer.testing import CliRunner

from lediflow.cli.app import app
from lediflow.codecs import Codec
from lediflow.errors import UserError
from lediflow.evaluation.speed import attention_backends, benchmark, pipeline_of
from tests.conftest import TINY, tiny_codec_settings

ONCE = {"device": torch.device("cpu"), "batch_size": 2, "repeats": 1}


def test_a_preset_is_timed_as_it_would_be_sampled():
    report = benchmark(pipeline_of("digits", TINY), **ONCE)
    assert report["nfe"] == {"sampler": 8, "decoder": 1, "flow": 4}
    assert (report["solver"], report["steps"]) == ("midpoint", 2)
    assert (report["latent_solver"], report["latent_steps"]) == ("midpoint", 4)
    ms = report["ms_per_image"]
    assert set(ms) == {"total", "sampler", "decoder", "flow", "other"}
    assert sum(ms.values()) - ms["total"] == pytest.approx(ms["total"], abs=0.01)
    assert report["images_per_second"] == pytest.approx(1000 / ms["total"], rel=0.01)
    assert report["peak_memory_gb"] > 0
    json.dumps(report)


def test_any_solver_and_number_of_steps():
    options = {"solver": "heun3", "steps": 1, "latent_steps": 2}
    report = benchmark(pipeline_of("digits", TINY), **ONCE, **options)
    assert report["nfe"] == {"sampler": 6, "decoder": 1, "flow": 3}
    with pytest.raises(UserError, match="--stage meanflow"):
        benchmark(pipeline_of("digits", TINY), **ONCE, solver="mean")


def test_a_preset_may_be_timed_as_refined_to_one_evaluation():
    some = pipeline_of("digits", [*TINY, "training.stages=[auxiliary,flow,sampler,meanflow]"])
    assert (some.flow.average_velocity, some.sampler.average_velocity) == (True, False)
    refined = pipeline_of("digits", TINY, average_velocity=True)
    assert benchmark(refined, **ONCE)["nfe"] == {"sampler": 1, "decoder": 1, "flow": 1}


def test_trained_models_plain_flow_matching_too(tiny_run):
    for name, nfe in ((".", {"sampler": 8, "decoder": 1, "flow": 4}), ("baseline", {"flow": 16})):
        report = benchmark(pipeline_of(str(tiny_run / name)), **ONCE)
        assert report["nfe"] == nfe
        assert set(report["networks"]) == set(nfe)


def test_backends_are_named_by_grid(monkeypatch):
    monkeypatch.delenv("LEDIFLOW_ATTENTION", raising=False)
    pipeline = pipeline_of("digits", [*TINY, "data.image_size=64", "auxiliary.z_size=16"])
    assert attention_backends(pipeline.flow, torch.device("cpu")) == {"32x32": "tiles", "16x16": "global"}
    monkeypatch.setenv("LEDIFLOW_ATTENTION", "dense")
    assert attention_backends(pipeline.flow, torch.device("cpu"))["32x32"] == "dense"


def test_a_codec_is_timed_for_itself_and_left_out_of_the_request(tiny_codec):
    pipeline = pipeline_of("digits", tiny_codec_settings(tiny_codec, "unused"))
    codec = Codec.load(tiny_codec)
    report = benchmark(pipeline, codec=codec, **ONCE)
    assert report["codec"]["ms_per_image"] > 0
    assert report["codec"]["parameters"] == sum(p.numel() for p in codec.model.parameters())
    assert "codec" not in report["nfe"]


def test_mistakes(tiny_run):
    with pytest.raises(UserError, match="--set changes a preset"):
        pipeline_of(str(tiny_run), ["data.image_size=8"])
    with pytest.raises(UserError, match="--average-velocity changes a preset"):
        pipeline_of(str(tiny_run), average_velocity=True)
    with pytest.raises(UserError, match="did you mean 'digits'"):
        pipeline_of("digit")


def test_command_line(monkeypatch):
    monkeypatch.delenv("LEDIFLOW_ATTENTION", raising=False)
    settings = [x for s in TINY for x in ("--set", s)]
    options = ["--batch-size", "1", "--repeats", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, ["benchmark", "digits", "--average-velocity", *options, *settings])
    assert result.exit_code == 0, result.output
    assert "flow 1 mean step, latent sampler 1 mean step" in result.output
    for network in ("sampler", "decoder", "flow", "other"):
        assert f"| {network} " in result.output
    assert "images/s" in result.output and "peak memory" in result.output
    result = CliRunner().invoke(app, ["benchmark", "digits", *options, *settings, "--json", "--steps", "1"])
    assert json.loads(result.stdout)["nfe"]["flow"] == 2
    result = CliRunner().invoke(app, ["benchmark", "digits", "--dtype", "bf61"])
    assert isinstance(result.exception, UserError)
    assert "did you mean 'bf16'" in str(result.exception)
