"""A whole diagnosis of tiny runs."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from lediflow import ode
from lediflow.conditions import Conditions
from lediflow.diagnosis import measurements as m
from lediflow.diagnosis.diagnose import diagnose
from lediflow.errors import UserError
from lediflow.fields import conditional
from lediflow.pipelines.load import load_pipeline
from lediflow.sources import image_noise


def test_a_tiny_run_on_digits(tiny_run):
    result = diagnose(tiny_run, "digits", num_images=60, latent_steps=1, device="cpu")
    assert result["images"] == 60
    assert len(result["findings"]) == 7
    numbers = result["numbers"]
    assert numbers["transport"]["gaussian"] > 1
    assert len(numbers["channels"]) == 4
    assert set(numbers["curvature"]) == set(numbers["baseline_curvature"])
    again = diagnose(tiny_run, "digits", num_images=60, latent_steps=1, device="cpu")
    assert again == result, "the same seeds give the same numbers"
    alone = diagnose(tiny_run / "pipeline", "digits", num_images=60, latent_steps=1, device="cpu")
    assert "baseline_curvature" not in alone["numbers"]
    assert alone["numbers"]["transport"] == numbers["transport"]


def test_a_tiny_run_with_average_velocity(tiny_mean_run):
    few = {"num_images": 50, "device": "cpu"}
    result = diagnose(tiny_mean_run, "digits", **few)
    assert [f["name"] for f in result["findings"]][7:] == [
        "one evaluation of the flow",
        "one evaluation of the latent sampler",
    ]
    numbers = result["numbers"]
    assert numbers["latent_sampler"] == {"solver": "mean", "steps": 1}
    assert "1 mean step" in result["findings"][4]["value"]
    assert "mean_1" not in numbers["baseline_curvature"]["error"]
    # a distilled flow has learned ends only: paths are those of the flow that made them
    distilled = diagnose(tiny_mean_run / "distill", "digits", latent_solver="midpoint", **few)["numbers"]
    assert distilled["latent_sampler"] == {"solver": "midpoint", "steps": 4}
    by_hand = _errors(tiny_mean_run / "flow", tiny_mean_run / "distill")
    assert distilled["curvature"]["error"] == pytest.approx(by_hand)
    ends = diagnose(tiny_mean_run, "digits", latent_solver="midpoint", **few)["numbers"]
    by_hand = _errors(tiny_mean_run / "meanflow", tiny_mean_run)
    assert ends["curvature"]["error"] == pytest.approx(by_hand)


def _errors(paths, model):
    """Errors of the paths of one model and one evaluation of another, at z as a diagnosis draws them."""
    pipeline, teacher = load_pipeline(model), load_pipeline(paths)
    auxiliary = pipeline.auxiliary
    with torch.no_grad():
        z = m.sampled_latents(pipeline, 50, steps=4, seed=0, batch_size=64)
        z = auxiliary.unstandardize(z)
        prior = auxiliary.decode(z)
        x = prior.at(image_noise(prior.mean.shape[1:], seed=0, indices=range(50), stream="x"))
        ends = {
            name: ode.integrate(conditional(teacher.flow, Conditions(z=z)), x, steps=n, solver=solver).end
            for name, n, solver in (
                ("fine", 64, "midpoint"), ("1", 1, "midpoint"), ("2", 2, "midpoint"), ("4", 4, "midpoint"),
                ("8", 8, "midpoint"), ("euler_1", 1, "euler"),
            )
        }  # fmt: skip
        ends["mean_1"] = x + pipeline.flow(x, torch.zeros(()), Conditions(z=z), torch.ones(()))
    fine = ends.pop("fine")
    return {name: 127.5 * (end - fine).square().mean().sqrt().item() for name, end in ends.items()}


def test_mistakes(tiny_run, tmp_path):
    with pytest.raises(UserError, match="no learned prior"):
        diagnose(tiny_run / "baseline", "digits", device="cpu")
    with pytest.raises(UserError, match="at least 50"):
        diagnose(tiny_run, "digits", num_images=10, device="cpu")
    for i in range(3):
        Image.new("L", (16, 16), 80 * i).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match="give --validation"):
        diagnose(tiny_run, str(tmp_path), device="cpu")
    with pytest.raises(UserError, match="not 3 and 3"):
        diagnose(tiny_run, str(tmp_path), validation=str(tmp_path), device="cpu")
