"""The temperature of the source: x = mu + temperature * sigma * noise."""

import shutil

import pytest
import torch

from lediflow import ode
from lediflow.errors import UserError
from lediflow.pipelines.load import load_pipeline
from lediflow.pipelines.recipes import Recipe
from lediflow.training.config import load_run_config
from lediflow.training.run_pipelines import write_pipelines


@pytest.fixture(scope="module", params=["", "baseline"])
def pipe(request, tiny_run):
    pipeline = load_pipeline(tiny_run / request.param)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def made(pipeline, **options):
    return pipeline(3, seed=5, output_type="pt", **options).images


def test_1_is_the_source_as_it_was_trained(pipe):
    assert torch.equal(made(pipe, temperature=1), made(pipe))


def test_the_flow_starts_at_mu_plus_temperature_sigma_noise(tiny_run):
    pipeline = load_pipeline(tiny_run)
    w = pipeline.noise(pipeline.auxiliary.z_shape, range(3), 5, "w")
    noise = pipeline.noise(pipeline.sample_shape, range(3), 5, "x")
    with torch.no_grad():
        z = pipeline.sample_z(w).end
        prior = pipeline.prior(z)
        end = pipeline.carry(prior.mean + 0.5 * prior.std * noise, z).end
    torch.testing.assert_close(made(pipeline, temperature=0.5), end.clamp(-1, 1), rtol=0, atol=1e-5)


def test_plain_flow_matching_starts_at_temperature_times_noise(tiny_run):
    pipeline = load_pipeline(tiny_run / "baseline")
    noise = pipeline.noise(pipeline.sample_shape, range(3), 5, "x")
    with torch.no_grad():
        end = ode.integrate(pipeline.flow_field(pipeline.labels_of(range(3))), 0.5 * noise, steps=8).end
    torch.testing.assert_close(made(pipeline, temperature=0.5), end.clamp(-1, 1), rtol=0, atol=1e-5)


def test_at_0_only_z_makes_images_differ(tiny_run):
    pipeline = load_pipeline(tiny_run)
    pipeline.set_progress_bar_config(disable=True)
    drawn, z = pipeline._draw, pipeline.noise(pipeline.auxiliary.z_shape, [0], 0, "w")
    pipeline._draw = lambda indices, seed: (z.expand(len(indices), -1, -1, -1), drawn(indices, seed)[1])
    cold, warm = made(pipeline, temperature=0), made(pipeline)
    torch.testing.assert_close(cold[0], cold[1], rtol=0, atol=1e-5)
    assert (warm[0] - warm[1]).abs().max() > 1e-3


def test_a_pipeline_keeps_its_own(pipe, tmp_path):
    pipe.register_to_config(strengths={"temperature": 0.5})
    pipe.save_pretrained(tmp_path / "cold")
    again = load_pipeline(tmp_path / "cold")
    pipe.register_to_config(strengths=None)
    assert torch.equal(made(again), made(pipe, temperature=0.5))
    assert torch.equal(made(again, temperature=1), made(pipe))


@pytest.mark.parametrize("value", [-0.1, 1.6])
def test_others_are_refused(pipe, value):
    with pytest.raises(UserError, match=f"temperature must be between 0 and 1.5, not {value}"):
        pipe(1, temperature=value)


def test_a_run_gives_it_to_the_pipelines_that_start_at_the_learned_prior(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    write_pipelines(run, load_run_config(run).model_copy(update={"temperature": 0.8}), None)
    assert load_pipeline(run).temperature == load_pipeline(run).settle_strengths()["temperature"] == 0.8
    assert load_pipeline(run / "baseline").temperature == 1


def test_edited_pictures_start_with_the_models_own(tiny_run):
    pipeline = load_pipeline(tiny_run)
    picture = pipeline(1, seed=1).images[0]
    pipeline.register_to_config(strengths={"temperature": 0.0})
    first, second = (pipeline.vary(picture, 0.0, num_images=1, seed=seed).images[0] for seed in (1, 2))
    cold = pipeline.reconstruct(picture, output_type="pt")
    assert first.tobytes() == second.tobytes()
    torch.testing.assert_close(cold.prior_sample, cold.prior_mean, rtol=0, atol=1e-6)


def test_a_recipe_of_before_is_made_at_1(pipe):
    before = Recipe("sample", "model", "digest", {"seed": 5, "num_images": 1})
    pipe.register_to_config(strengths={"temperature": 0.5})
    again = before.make(pipe).images[0]
    pipe.register_to_config(strengths=None)
    assert again.tobytes() == pipe(1, seed=5, temperature=1).images[0].tobytes()
    assert again.tobytes() != pipe(1, seed=5, temperature=0.5).images[0].tobytes()
