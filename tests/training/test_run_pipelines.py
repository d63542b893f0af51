"""The pipelines that a run has: which there are, of which stages, and what is refused."""

import inspect
import shutil

import pytest
import torch
from conftest import FIRST_STAGES, REFINING, TINY, weights

from lediflow.errors import UserError
from lediflow.pipelines.load import PIPELINES, load_pipeline
from lediflow.training import checkpoint
from lediflow.training.config import load_config, load_run_config
from lediflow.training.run import train
from lediflow.training.run_pipelines import (
    RUN_PIPELINES,
    last_checkpoint,
    load_network,
    pipeline_stages,
    trained_stages,
)
from lediflow.training.stages import STAGES


def test_every_row_names_a_pipeline_its_parts_and_stages_that_train_them():
    # RUN/pipeline is that of a run of generators or of upsamplers
    assert len({(row.folder, row.kind) for row in RUN_PIPELINES}) == len(RUN_PIPELINES)
    for row in RUN_PIPELINES:
        arguments = inspect.signature(PIPELINES[row.kind]).parameters
        assert (
            {a.name for a in arguments.values() if a.default is a.empty} <= set(row.parts) <= set(arguments)
        )
        for candidates in row.parts.values():
            assert candidates and set(candidates) <= set(STAGES)
            assert len({STAGES[name].network for name in candidates}) == 1, "one kind of network"


def test_a_run_has_a_pipeline_for_each_way_to_sample(tiny_mean_run, tiny_run):
    found = {
        folder: load_pipeline(tiny_mean_run / folder)
        for folder in (".", "flow", "meanflow", "distill", "baseline", "baseline-meanflow")
    }
    refined = {
        name: (p.flow.average_velocity, hasattr(p, "sampler") and p.sampler.average_velocity)
        for name, p in found.items()
    }
    assert refined == {
        ".": (True, True),
        "flow": (False, False),
        "meanflow": (True, True),
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


def test_each_part_is_of_the_most_refined_stage_there_is(tiny_mean_run, tiny_run):
    first = dict.fromkeys(("auxiliary", "flow", "sampler"))
    assert {
        folder: stages for folder, (_, stages) in pipeline_stages(tiny_run, load_run_config(tiny_run)).items()
    } == {
        ".": {name: name for name in first},
        "baseline": {"flow": "baseline"},
    }
    refined = {
        folder: stages
        for folder, (_, stages) in pipeline_stages(tiny_mean_run, load_run_config(tiny_mean_run)).items()
    }
    assert refined == {
        ".": {"auxiliary": "auxiliary", "flow": "meanflow-distill", "sampler": "sampler-meanflow"},
        "meanflow": {"auxiliary": "auxiliary", "flow": "meanflow", "sampler": "sampler-meanflow"},
        "distill": {"auxiliary": "auxiliary", "flow": "distill", "sampler": "sampler-meanflow"},
        "flow": {name: name for name in first},
        "baseline": {"flow": "baseline"},
        "baseline-meanflow": {"flow": "baseline-meanflow"},
    }
    for folder, stages in refined.items():
        pipeline = load_pipeline(tiny_mean_run / folder)
        for part, stage in stages.items():
            there = getattr(pipeline, part).state_dict()
            assert all(torch.equal(there[k], v) for k, v in weights(tiny_mean_run, stage).items()), folder
    assert trained_stages(tiny_run) == list(FIRST_STAGES)
    assert trained_stages(tiny_mean_run) == [*FIRST_STAGES, *REFINING]


def test_what_was_trained_with_another_prior_is_in_no_pipeline(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    longer = load_config("digits", [*TINY, "training.auxiliary.steps=8"])
    train(longer, run, stages=["auxiliary"], device="cpu")
    assert set(pipeline_stages(run, load_run_config(run))) == {"baseline"}


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


def test_networks_of_a_run_are_its_averages_ready_for_use(tiny_run, tmp_path):
    config = load_config("digits", TINY)
    network = load_network(tiny_run, "flow", config)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert all(torch.equal(network.state_dict()[k], v) for k, v in weights(tiny_run, "flow").items())
    model = checkpoint.load_tensors(last_checkpoint(tiny_run, "flow"), "model.safetensors")
    assert not torch.equal(model["patch_in.weight"], network.patch_in.weight)
    with pytest.raises(UserError, match="no trained meanflow stage yet; run .*--stage meanflow"):
        load_network(tiny_run, "meanflow", config)
    with pytest.raises(UserError, match="does not fit the config"):
        load_network(tiny_run, "flow", load_config("digits", [*TINY, "flow.widths=[16,24]"]))
