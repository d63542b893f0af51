"""The pipelines of a run of upsamplers: which there are, where they start, what the run says of them."""

import json

import torch

from lediflow.evaluation.upsampling import HeldOut, of_stage
from lediflow.networks.upsampling_prior import UpsamplingPrior
from lediflow.pipelines.load import load_upsampler
from lediflow.training.card import run_report
from lediflow.training.config import load_run_config
from lediflow.training.run_pipelines import pipeline_stages


def test_a_run_of_upsamplers_has_its_pipelines(tiny_upsampler_run):
    run = tiny_upsampler_run
    assert {folder: stages for folder, (_, stages) in pipeline_stages(run, load_run_config(run)).items()} == {
        ".": {"flow": "upsampler-meanflow"},
        "upsampler": {"flow": "upsampler"},
        "upsampler-learned": {"flow": "upsampler-learned-meanflow", "prior": "upsampler-prior"},
    }
    small = torch.rand(2, 1, 4, 4) * 2 - 1
    found = {folder: load_upsampler(run / folder) for folder in (".", "upsampler", "upsampler-learned")}
    for pipeline in found.values():
        pipeline.set_progress_bar_config(disable=True)
    levels = {folder: pipeline.config.noise_level for folder, pipeline in found.items()}
    assert levels == {".": 200, "upsampler": 200, "upsampler-learned": 0}
    assert found["."](small, output_type="pt").nfe == {"flow": 1}
    assert found["upsampler"](small, 3, output_type="pt").nfe == {"flow": 3}
    out = found["upsampler-learned"](small, output_type="pt")
    assert out.images.shape == (2, 1, 16, 16) and out.nfe == {"flow": 1, "prior": 1}
    assert isinstance(found["upsampler-learned"].prior, UpsamplingPrior)
    assert found["upsampler"](torch.zeros(1, 1, 6, 8), 1, output_type="pt").images.shape == (1, 1, 24, 32)
    assert not (run / "upsampler-regression" / "pipeline").exists()


def test_the_pipeline_enlarges_as_the_stage_was_trained(tiny_upsampler_run):
    """The same network, start and steps: what differs is the noise."""
    held = HeldOut(tiny_upsampler_run, "digits", count=4)
    pair = next(held.pairs(stage := held.stage("upsampler")))
    pipeline = load_upsampler(tiny_upsampler_run / "upsampler")
    pipeline.set_progress_bar_config(disable=True)
    # without noise there is none to differ; the level that the network is told differs alike
    told = pair.conditions.also(noise_level=torch.zeros(4))
    stage.solver = "euler"
    wanted = stage.carry(pair.conditions["image"], told, 2)
    found = pipeline(pair.low, 2, noise_level=0, output_type="pt").images
    torch.testing.assert_close(found, wanted.clamp(-1, 1), rtol=0, atol=1e-3)
    made, evaluations, _ = of_stage(held, stage, 2)(pair)
    assert evaluations == 2 and not torch.allclose(made, wanted, atol=1e-2)


def test_the_run_says_how_to_use_it(tiny_upsampler_run):
    card = (tiny_upsampler_run / "README.md").read_text()
    assert "FlowUpsamplePipeline.from_pretrained" in card and 'pipe(image="small.png").images' in card
    assert "pipeline_tag: image-to-image" in card
    config = load_run_config(tiny_upsampler_run)
    report = run_report(tiny_upsampler_run, config)
    assert f"lediflow upsample {tiny_upsampler_run} IMAGE --output" in report["next"][0]
    assert len(report["next"]) == 3 and json.dumps(report)
