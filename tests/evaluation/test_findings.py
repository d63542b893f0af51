"""Every verdict, on numbers that call for it, and a whole diagnosis of a tiny run."""

from __future__ import annotations

import copy

import pytest
import torch

from lediflow import ode
from lediflow.errors import UserError
from lediflow.evaluation import diagnostics as d
from lediflow.evaluation.diagnose import diagnose
from lediflow.evaluation.findings import findings, verdict
from lediflow.pipelines.base import load_pipeline
from lediflow.sources import image_noise

NEAR = {"mmd": 0.0, "share": 0.0, "density": 1.0, "coverage": 0.96}
GOOD = {
    "transport": {"learned": 0.05, "gaussian": 1.24, "per_pixel_gaussian": 0.4},
    "calibration": {"residual_std": 1.0, "within_1_sigma": 0.68, "within_2_sigma": 0.95, "nll": -1.0},
    "calibration_train": {"residual_std": 1.0, "within_1_sigma": 0.68, "within_2_sigma": 0.95, "nll": -1.0},
    "sigma": {"share_at_floor": 0.0, "floor": 0.011, "median": 0.1},
    "channels": [{"kl": 20.0, "spread": 0.8, "signal": 0.9}, {"kl": 30.0, "spread": 0.9, "signal": 0.95}],
    "latent_sampler": {"solver": "midpoint", "steps": 4},
    "latent_gap": {
        "unseen": NEAR,
        "gaussian": NEAR | {"share": 1.0},
        "sampled": NEAR,
        "sampled_many": NEAR,
        "noise": 0.01,
    },
    "curvature": {
        "error": {"1": 2.0, "2": 1.0, "4": 0.5, "8": 0.1, "euler_1": 9.0},
        "length": 20.0,
        "straightness": 0.1,
        "profile": [0.1] * 8,
    },
}


def _judged(**changes):
    """The findings on good numbers with some changed, by the key of the change."""
    numbers = copy.deepcopy(GOOD)
    for key, value in changes.items():
        numbers[key] = value if isinstance(value, list) or key not in numbers else numbers[key] | value
    return numbers, findings(numbers)


def test_good_numbers_are_good_and_nothing_is_to_be_changed():
    numbers, found = _judged()
    assert [f.grade for f in found] == ["good"] * 7
    assert not any(f.change for f in found)
    assert "24.8 times nearer" in verdict(numbers, found)
    assert "Nothing stands out" in verdict(numbers, found)


def _gap(**sampled):
    return {"sampled": NEAR | sampled, "sampled_many": NEAR | sampled}


@pytest.mark.parametrize(
    ("which", "changes", "grade", "advice"),
    [
        (0, {"transport": {"learned": 0.9}}, "poor", "lower beta or enlarge z"),
        (0, {"transport": {"learned": 0.3}}, "fair", "Lower beta"),
        (1, {"calibration": {"residual_std": 1.6}}, "poor", "fewer steps"),
        (1, {"calibration": {"residual_std": 1.2}}, "fair", "higher beta"),
        (
            1,
            {"calibration": {"residual_std": 0.8}, "calibration_train": {"residual_std": 0.8}},
            "fair",
            "Train the auxiliary stage longer",
        ),
        (2, {"sigma": {"share_at_floor": 0.05}}, "fair", "raise beta"),
        (2, {"sigma": {"share_at_floor": 0.5}}, "poor", "raise beta"),
        (3, {"channels": [{"kl": 0.0, "spread": 0.0, "signal": 0.0}] * 2}, "poor", "Lower beta"),
        (
            3,
            {"channels": [GOOD["channels"][0], {"kl": 0.0, "spread": 0.001, "signal": 0.0}]},
            "fair",
            "fewer auxiliary.latent_channels",
        ),
        (3, {"channels": [{"kl": 99.0, "spread": 1.0, "signal": 0.999}] * 2}, "fair", "Raise beta"),
        (4, {"latent_gap": _gap(density=0.75)}, "fair", "sampler stage longer"),
        (4, {"latent_gap": _gap(density=0.4)}, "poor", "sampler stage longer"),
        (4, {"latent_gap": _gap(share=0.5)}, "poor", "sampler stage longer"),
        (4, {"latent_gap": {"sampled": NEAR | {"density": 0.5}}}, "fair", "--latent-steps"),
        (5, {"curvature": {"error": {"1": 9, "2": 6, "4": 2, "8": 1, "euler_1": 9}}}, "fair", "--steps 4"),
        (
            5,
            {"curvature": {"error": dict.fromkeys(("1", "2", "4", "8", "euler_1"), 9)}},
            "poor",
            "flow stage",
        ),
        (6, {"curvature": {"straightness": 0.9}}, "fair", ""),
        (
            6,
            {"baseline_curvature": {"error": {"1": 30.0}, "straightness": 0.01, "length": 50.0}},
            "poor",
            "improve the prior",
        ),
    ],
)
def test_bad_numbers_are_named_with_what_to_change(which, changes, grade, advice):
    numbers, found = _judged(**changes)
    assert [f.grade for i, f in enumerate(found) if i != which] == ["good"] * 6
    assert found[which].grade == grade
    assert advice in found[which].change
    assert found[which].name in verdict(numbers, found)


@pytest.mark.parametrize(
    ("one", "grade", "says"),
    [
        (2.9, "good", "where many do"),
        (5.9, "good", "as near as the two"),
        (7.0, "fair", "two of a midpoint step end nearer"),
        (8.9, "poor", "no nearer than an Euler step"),
    ],
)
def test_one_evaluation_is_judged_beside_a_midpoint_and_an_euler_step(one, grade, says):
    error = {"1": 6.0, "2": 1.0, "4": 0.5, "8": 0.1, "euler_1": 9.0}
    numbers, found = _judged(curvature={"error": error | {"mean_1": one}})
    assert [f.grade for f in found[:7]] == ["good"] * 7
    (last,) = found[7:]
    assert (last.name, last.grade) == ("one evaluation of the flow", grade)
    assert says in last.says
    assert ("the stage meanflow" in last.change) == (grade != "good")
    numbers, found = _judged(
        sampler_curvature={"error": {k: v / 10 for k, v in error.items()} | {"mean_1": 1}}
    )
    assert (found[7].name, found[7].grade) == ("one evaluation of the latent sampler", "poor")
    assert "sampler-meanflow" in verdict(numbers, found)


def test_a_prior_worse_than_noise_is_called_so():
    numbers, found = _judged(transport={"learned": 2.0})
    assert found[0].grade == "poor"
    assert "does not help" in verdict(numbers, found)


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


def _errors(paths, model):
    """Errors of the paths of one model and one evaluation of another, at z as a diagnosis draws them."""
    pipeline, teacher = load_pipeline(model), load_pipeline(paths)
    auxiliary = pipeline.auxiliary
    with torch.no_grad():
        z = d.sampled_latents(pipeline, 50, steps=4, seed=0, batch_size=64)
        z = auxiliary.unstandardize(z)
        prior = auxiliary.decode(z)
        x = prior.at(image_noise(prior.mean.shape[1:], seed=0, indices=range(50), stream="x"))
        ends = {
            name: ode.integrate(lambda t, s: teacher.flow(s, t, z), x, steps=n, solver=solver).end
            for name, n, solver in (
                ("fine", 64, "midpoint"), ("1", 1, "midpoint"), ("2", 2, "midpoint"), ("4", 4, "midpoint"),
                ("8", 8, "midpoint"), ("euler_1", 1, "euler"),
            )
        }  # fmt: skip
        ends["mean_1"] = x + pipeline.flow(x, torch.zeros(()), z, None, torch.ones(()))
    fine = ends.pop("fine")
    return {name: 127.5 * (end - fine).square().mean().sqrt().item() for name, end in ends.items()}


def test_mistakes(tiny_run, tmp_path):
    from PIL import Image

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
