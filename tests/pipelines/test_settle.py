"""What a request is settled to is what the pipelines do."""

import pytest

from lediflow.errors import UserError
from lediflow.pipelines.load import load_pipeline


@pytest.fixture(scope="module")
def models(tiny_mean_run):
    """A refined model, the same before, and plain flow matching before and after."""
    found = {
        name: load_pipeline(tiny_mean_run / name) for name in (".", "flow", "baseline", "baseline-meanflow")
    }
    for pipeline in found.values():
        pipeline.set_progress_bar_config(disable=True)
    return found


@pytest.mark.parametrize(
    ("model", "asked", "expected", "nfe"),
    [
        (".", {}, ("mean", 1, "mean", 1), (1, 1)),
        (".", {"steps": 4}, ("mean", 4, "mean", 1), (4, 1)),
        (".", {"solver": "midpoint"}, ("midpoint", 2, "mean", 1), (4, 1)),
        (".", {"latent_solver": "heun3"}, ("mean", 1, "heun3", 4), (1, 12)),
        ("flow", {}, ("midpoint", 2, "midpoint", 4), (4, 8)),
        ("flow", {"solver": "heun3", "latent_steps": 2}, ("heun3", 2, "heun3", 2), (6, 6)),
        ("baseline", {}, ("midpoint", 8), (16,)),
        ("baseline-meanflow", {}, ("mean", 1), (1,)),
        ("baseline-meanflow", {"solver": "heun3"}, ("heun3", 8), (24,)),
    ],
)
def test_settled_options_make_what_the_pipeline_makes_by_itself(models, model, asked, expected, nfe):
    pipeline = models[model]
    options = pipeline.settle(**asked)
    assert tuple(options.values()) == expected
    own, ours = pipeline(1, **asked), pipeline(1, **options)
    assert (
        own.nfe
        == ours.nfe
        == dict(zip(("flow", "sampler"), nfe, strict=False)) | ({"decoder": 1} if len(nfe) > 1 else {})
    )
    assert own.images[0].tobytes() == ours.images[0].tobytes()


def test_a_sampler_may_lack_what_the_flow_has(models, tiny_run):
    pipeline = load_pipeline(tiny_run)
    pipeline.register_modules(flow=models["."].flow)
    assert tuple(pipeline.settle(solver="mean").values()) == ("mean", 1, "midpoint", 4)
    assert pipeline(1, solver="mean").nfe == {"sampler": 8, "decoder": 1, "flow": 1}


def test_mean_without_average_velocity_is_refused_by_network(models):
    with pytest.raises(UserError, match="--stage meanflow"):
        models["flow"].settle(solver="mean")
    with pytest.raises(UserError, match="--stage sampler-meanflow"):
        models["flow"].settle(latent_solver="mean")
    assert "latent_solver" not in models["baseline"].settle(latent_solver="mean")


def test_a_strength_that_a_pipeline_does_not_have_is_refused_by_name(models):
    with pytest.raises(UserError, match=r"FlowMatchingPipeline has no latent_guidance; it has .*temperature"):
        models["baseline"].settle_strengths(latent_guidance=1.5)
    with pytest.raises(UserError, match="LeDiFlowPipeline has no label"):
        models["."].settle_strengths(label=3)
    assert "latent_guidance" not in models["baseline"].settle_strengths(latent_guidance=None)
