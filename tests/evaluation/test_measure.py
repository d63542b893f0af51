"""One row: its images, its reconstructions, its times; and what is asked for it."""

from __future__ import annotations

import torch

from lediflow.conditions import Conditions
from lediflow.evaluation.measure import in_pixels, network_parts, reconstruct, timings
from lediflow.evaluation.request import Request, Settings, latent_words
from lediflow.ode import in_words
from lediflow.pipelines.lediflow import LeDiFlowPipeline
from lediflow.pipelines.load import load_pipeline
from lediflow.sources import image_noise
from lediflow.training.builders import build_auxiliary, build_flow, build_sampler
from lediflow.training.config import load_config
from tests.conftest import TINY, randomized


def test_in_words():
    assert in_words("mean", 1) == "1 mean step"
    assert in_words("midpoint", 4) == "4 midpoint steps"
    assert in_words("dopri5", 4) == "dopri5"
    assert latent_words({"latent_solver": "mean", "latent_steps": 2}) == "2 mean steps"
    assert latent_words({"solver": "mean", "steps": 1}) == ""


def test_a_request_has_what_all_rows_share_and_its_own_steps():
    settings = Settings(data="digits", num_images=30, seed=4, batch_size=7, dtype="bf16")
    assert settings.request(solver="euler", steps=3) == Request("euler", 3, 30, 4, 7, "bf16")


def test_a_model_with_classes_makes_all_of_them_in_turn():
    config = load_config("digits", [*TINY, "data.classes=3", "training.stages=[meanflow,sampler-meanflow]"])
    pipeline = LeDiFlowPipeline(
        auxiliary=build_auxiliary(config),
        flow=build_flow(config, average_velocity=True),
        sampler=build_sampler(config, average_velocity=True),
    )
    pipeline.set_progress_bar_config(disable=True)
    randomized(pipeline.flow, 0.3)  # many weights are zero before training, and then no class tells
    request = Request("mean", 1, 5, 0, 4, "fp32", "mean", 1)
    images = request.images(pipeline, range(2, 7)).images
    for i, image in zip(range(2, 7), images, strict=True):
        right, wrong = (
            pipeline(1, first_image=i, class_labels=(i + off) % 3, output_type="pt").images[0]
            for off in (0, 1)
        )
        torch.testing.assert_close(image, right, atol=1e-4, rtol=0)
        assert (image - wrong).abs().max() > 1e-3


def test_reconstruction_is_the_flow_run_by_hand(tiny_run):
    pipeline = load_pipeline(tiny_run)
    y = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    request = Request("euler", 1, 1, 3, 2, "fp32")
    with torch.no_grad():
        z = pipeline.auxiliary.encode(y).mean
        x = pipeline.auxiliary.decode(z).at(image_noise((1, 16, 16), seed=3, indices=range(5), stream="x"))
        expected = (x + pipeline.flow(x, torch.zeros(()), Conditions(z=z))).clamp(-1, 1)
    torch.testing.assert_close(reconstruct(pipeline, y, request), expected, atol=1e-5, rtol=0)


def test_reconstruction_by_the_average_velocity(tiny_mean_run):
    pipeline = load_pipeline(tiny_mean_run)
    y = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        z = pipeline.auxiliary.encode(y).mean
        x = pipeline.auxiliary.decode(z).at(image_noise((1, 16, 16), seed=3, indices=range(3), stream="x"))
        expected = (x + pipeline.flow(x, torch.zeros(()), Conditions(z=z), torch.ones(()))).clamp(-1, 1)
    found = reconstruct(pipeline, y, Request("mean", 1, 1, 3, 2, "fp32"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_timings_count_evaluations_of_each_row(tiny_run):
    pipeline = load_pipeline(tiny_run)
    pipeline.set_progress_bar_config(disable=True)
    rows = [(pipeline, Request("midpoint", n, 4, 0, 4, "fp32", latent_steps=2)) for n in (1, 3)]
    found = timings(rows)
    assert [f["nfe"] for f in found] == [
        {"sampler": 4, "decoder": 1, "flow": 2},
        {"sampler": 4, "decoder": 1, "flow": 6},
    ]
    assert all(f["ms_per_image"][part] > 0 for f in found for part in ("total", "flow", "sampler", "decoder"))
    (whole,) = timings(rows[:1], repeats=1, split=False)
    assert list(whole["ms_per_image"]) == ["total"] and whole["nfe"] == found[0]["nfe"]


def test_a_compiled_network_is_timed_where_it_runs(tiny_run):
    pipeline = load_pipeline(tiny_run)
    pipeline.flow._compiled_call_impl = pipeline.flow._call_impl  # as torch's Module.compile leaves it
    parts = network_parts(pipeline)
    assert parts["flow"] == (pipeline.flow, "_compiled_call_impl")
    assert parts["sampler"] == (pipeline.sampler, "forward")
    pipeline.set_progress_bar_config(disable=True)
    (found,) = timings([(pipeline, Request("midpoint", 1, 2, 0, 2, "fp32"))], repeats=1)
    assert found["ms_per_image"]["flow"] > 0
    assert pipeline.flow._compiled_call_impl is not None, "the network stays compiled"


def test_a_model_of_latents_is_known_before_its_codec_is_loaded(tiny_run):
    pipeline = load_pipeline(tiny_run)
    assert in_pixels(pipeline)
    pipeline.register_to_config(codec_space={"codec": "somewhere"})
    assert pipeline.vae is None
    assert not in_pixels(pipeline)
