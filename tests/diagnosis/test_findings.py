"""Every verdict, on numbers that call for it."""

from __future__ import annotations

import copy
from math import nan

import pytest

from lediflow.diagnosis.findings import findings, verdict

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
            "fewer auxiliary.z_channels",
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


def test_what_is_no_number_is_poor():
    _, found = _judged(transport={"learned": nan}, calibration={"residual_std": nan})
    assert [f.grade for f in found] == ["poor", "poor"] + ["good"] * 5
    assert "diverged" in found[0].says


def test_images_that_are_all_the_same_and_a_flow_that_does_nothing_are_judged_too():
    error = dict.fromkeys(("1", "2", "4", "8", "euler_1", "mean_1"), 0.0)
    _, found = _judged(transport={"per_pixel_gaussian": 0.0}, curvature={"error": error})
    assert (found[0].grade, found[7].grade) == ("poor", "good")


@pytest.mark.parametrize(
    "change",
    [
        lambda x: {"transport": {"learned": x}},
        lambda x: {"calibration": {"residual_std": x}},
        lambda x: {"calibration": {"residual_std": x}, "calibration_train": {"residual_std": x}},
        lambda x: {"sigma": {"share_at_floor": x / 3}},
        lambda x: {"channels": [{"kl": 9.0, "spread": 0.8, "signal": x / 3}]},
        lambda x: {"latent_gap": _gap(density=x, share=1 - x)},
        lambda x: {"curvature": {"straightness": x}},
        lambda x: {"baseline_curvature": {"error": {"1": 1.0}, "straightness": x, "length": 9.0}},
        lambda x: {"curvature": {"error": GOOD["curvature"]["error"] | {"1": 1.5, "mean_1": 4 * x}}},
    ],
)
def test_the_thresholds_leave_no_gap(change):
    for i in range(1, 301):
        _, found = _judged(**change(i / 100))
        assert not any("diverged" in f.says for f in found), i / 100
