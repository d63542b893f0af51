"""What measurements.py measures, in words: a verdict for each number, and what to change.

Each finding turns numbers into text and a few facts. `THRESHOLDS` is the table of what the facts mean: of a
finding's rows, the first that holds is the verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from lediflow.diagnosis.measurements import FINE_STEPS, MANY_LATENT_STEPS, STEPS
from lediflow.ode import in_words

Grade = Literal["good", "fair", "poor"]
Numbers = Mapping[str, Any]
Described = tuple[str, dict[str, Any]]  # value as text, and the facts by name
VISIBLE = 3.0  # grey levels of 255, root mean square: below that two images look the same
NEAR_Z = 0.1  # standard deviations of z, root mean square: below that two z mean the same image
ACTIVE = 0.01  # variance of q's mean over images above which a channel of z is used


@dataclass(frozen=True)
class Finding:
    """One number, judged."""

    name: str  # what was measured
    value: str  # as text, with its unit
    grade: Grade
    says: str  # the verdict in a sentence
    change: str = ""  # what to change; empty where nothing is to be


@dataclass(frozen=True)
class Threshold:
    """One row of the table: it holds where the fact is in [low, high]; what stands in braces is filled in."""

    fact: str
    low: float
    high: float
    grade: Grade
    says: str
    change: str = ""


TRAIN_LONGER = "Train the auxiliary stage longer: its loss is least where sigma is honest."
MEMORISED = "sigma is too small on new images only: the auxiliary model has memorised the training images."
LEARN_LESS = "Train the auxiliary stage for fewer steps, on more images, or with a higher beta."
POINT = "Where sigma is at its floor the prior is almost a point, and the flow has nothing to move."
WIDEN = "Harmless on a constant background; otherwise raise beta or shrink z: it holds too much detail."
APART = "Sampled z lie apart from encoded ones, and more steps do not help: images start from the wrong z."
BETTER_Z = "Train the sampler stage longer or widen it; or raise beta or shrink z, which makes z easier."
ENOUGH = f"{{steps}} enough: more change less than {VISIBLE:g} grey levels."
STRAY = "Velocities stray from the straight line by {bend:.1f} grey levels."
REFINE = "Train the stage {stage} longer; until then a midpoint step, two evaluations, is better."

DIVERGED = Threshold(
    "", 0, 0, "poor", "This is not a finite number: the model has diverged.", "Train it again."
)

# fmt: off
THRESHOLDS: dict[str, tuple[Threshold, ...]] = {
    "transport cost E|y - x|² per element": (
        Threshold("of_any", 1, inf, "poor",
            "z tells nothing about the image: the prior is no better than one without z.",
            "Train the auxiliary stage longer; if it has converged, lower beta or enlarge z "
            "(auxiliary.z_channels, z_size)."),
        Threshold("of_pixels", 0.5, 1, "fair",
            "The start is {nearer:.1f} times nearer than noise; z explains less than half of what can vary.",
            "Lower beta, enlarge z, or train the auxiliary stage longer."),
        Threshold("of_pixels", 0, 0.5, "good", "The start is {nearer:.1f} times nearer than noise."),
    ),
    "calibration of sigma on held-out images": (
        Threshold("memorised", 1.5, inf, "poor", MEMORISED, LEARN_LESS),
        Threshold("memorised", 1.1, 1.5, "fair", MEMORISED, LEARN_LESS),
        Threshold("spread", 1.5, inf, "poor", "sigma is too small on average.", TRAIN_LONGER),
        Threshold("spread", 1.1, 1.5, "fair", "sigma is too small on average.", TRAIN_LONGER),
        Threshold("spread", 0.9, 1.1, "good", "sigma is honest on average."),
        Threshold("spread", 0.67, 0.9, "fair", "sigma is too large on average.", TRAIN_LONGER),
        Threshold("spread", 0, 0.67, "poor", "sigma is too large on average.", TRAIN_LONGER),
    ),
    "sigma at its floor": (
        Threshold("share", 0.1, 1, "poor", POINT, WIDEN),
        Threshold("share", 0.01, 0.1, "fair", POINT, WIDEN),
        Threshold("share", 0, 0.01, "good", "The prior keeps its width nearly everywhere."),
    ),
    "posterior collapse of z": (
        Threshold("used", 0, 0, "poor",
            "z is empty: every channel is noise.", "Lower beta by a factor of 4 or more."),
        Threshold("empty", 1, inf, "fair",
            "Channels that carry nothing and cost time in the latent sampler: {empty} of {count}.",
            "Lower beta to fill them, or use fewer auxiliary.z_channels."),
        Threshold("signal", 0.99, 1, "fair",
            "z is nearly free of noise ({kl:.0f} nats per image), so it is hard to sample.", "Raise beta."),
        Threshold("signal", 0, 0.99, "good", "Every channel carries something, and none is free of noise."),
    ),
    "gap between sampled z and encoded z": (
        Threshold("fit", 0.9, inf, "good", "Sampled z lie where encoded z do."),
        Threshold("mended", 0.5, inf, "fair",
            "The latent sampler is good, but takes too few steps.", "Use more --latent-steps."),
        Threshold("fit", 0.6, 0.9, "fair", APART, BETTER_Z),
        Threshold("fit", -inf, 0.6, "poor", APART, BETTER_Z),
    ),
    "endpoint error of few midpoint steps": (
        Threshold("enough", 1, 2, "good", ENOUGH),
        Threshold("enough", 3, STEPS[-1], "fair", ENOUGH,
            "Sample with --steps {enough}, or train the flow stage longer."),
        Threshold("enough", inf, inf, "poor",
            f"Even {STEPS[-1]} steps end visibly elsewhere than many.",
            "Train the flow stage longer; if it has converged, improve the prior (lower beta, larger z)."),
    ),
    "bend of the paths": (
        Threshold("less", 0, inf, "good", STRAY + " From N(0, I) it is {other:.1f}."),
        Threshold("less", -inf, 0, "poor",
            STRAY + " From N(0, I) it is {other:.1f}: the prior does not make the flow's work easier.",
            "Train the flow stage longer, or improve the prior."),
        Threshold("bend", 0, 4 * VISIBLE, "good", STRAY),
        Threshold("bend", 4 * VISIBLE, inf, "fair", STRAY),
    ),
    "one evaluation": (
        Threshold("past_near", -inf, 0, "good", "One evaluation ends where many do."),
        Threshold("past_two", -inf, 0, "good", "One evaluation ends as near as the two of a midpoint step."),
        Threshold("past_euler", -inf, 0, "fair",
            "One evaluation helps, but the two of a midpoint step end nearer.", REFINE),
        Threshold("past_euler", 0, inf, "poor",
            "One evaluation ends no nearer than an Euler step: the average velocity is not learnt.", REFINE),
    ),
}
# fmt: on


def findings(numbers: Numbers) -> list[Finding]:
    """Judge every number that was measured."""
    described = (_transport, _calibration, _sigma, _channels, _gap, _paths, _bend)
    found = [
        _judged(name, name, *describe(numbers)) for name, describe in zip(THRESHOLDS, described, strict=False)
    ]
    for part, key, unit, near, stage in (
        ("the flow", "curvature", "grey levels", VISIBLE, "meanflow (or distill)"),
        ("the latent sampler", "sampler_curvature", "sigma of z", NEAR_Z, "sampler-meanflow"),
    ):
        error = numbers.get(key, {"error": {}})["error"]
        if "mean_1" in error:
            value, facts = _one_evaluation(error, unit, near)
            facts["stage"] = stage
            found.append(_judged(f"one evaluation of {part}", "one evaluation", value, facts))
    return found


def _judged(name: str, ladder: str, value: str, facts: Mapping[str, Any]) -> Finding:
    held = (r for r in THRESHOLDS[ladder] if r.fact in facts and r.low <= facts[r.fact] <= r.high)
    row = next(held, DIVERGED)
    return Finding(name, value, row.grade, row.says.format(**facts), row.change.format(**facts))


def verdict(numbers: Numbers, found: list[Finding]) -> str:
    """Say in a sentence or two whether the prior helps, and what is weakest."""
    cost = numbers["transport"]
    times = cost["gaussian"] / cost["learned"]
    helps = (
        f"The learned prior helps: its start lies {times:.1f} times nearer to the images than N(0, I)."
        if times > 1
        else "The learned prior does not help: it starts farther from the images than N(0, I)."
    )
    for grade in ("poor", "fair"):
        for finding in found:
            if finding.grade == grade:
                return f"{helps} Weakest: {finding.name}. {finding.change}".strip()
    return f"{helps} Nothing stands out as weak."


def _transport(numbers: Numbers) -> Described:
    cost = numbers["transport"]
    value = (
        f"{cost['learned']:.4g} from P_L, {cost['per_pixel_gaussian']:.4g} from a Gaussian per pixel, "
        f"{cost['gaussian']:.4g} from N(0, I)"
    )
    # images that are all the same leave nothing for z to explain
    of_pixels = cost["learned"] / max(cost["per_pixel_gaussian"], 1e-12)
    of_noise = cost["learned"] / cost["gaussian"]
    return value, {"of_pixels": of_pixels, "of_any": max(of_pixels, of_noise), "nearer": 1 / of_noise}


def _calibration(numbers: Numbers) -> Described:
    unseen, train = numbers["calibration"], numbers["calibration_train"]
    spread = unseen["residual_std"]
    value = (
        f"residuals of {spread:.3f} sigma ({train['residual_std']:.3f} in training), "
        f"{unseen['within_1_sigma']:.1%} within 1 sigma (68.3% if Gaussian), "
        f"{unseen['within_2_sigma']:.1%} within 2 (95.4%)"
    )
    memorised = {"memorised": spread} if spread > 1.05 * train["residual_std"] else {}
    return value, {"spread": spread, **memorised}


def _sigma(numbers: Numbers) -> Described:
    found = numbers["sigma"]
    share = found["share_at_floor"]
    value = f"{share:.2%} of elements at {found['floor']:.3g}; median sigma {found['median']:.3g}"
    return value, {"share": share}


def _channels(numbers: Numbers) -> Described:
    channels = numbers["channels"]
    used, kl = sum(c["spread"] > ACTIVE for c in channels), [c["kl"] for c in channels]
    by_channel = ", ".join(f"{nats:.1f}" for nats in kl)
    value = f"{used} of {len(channels)} channels used; KL by channel {by_channel} nats per image"
    signal = min(c["signal"] for c in channels)
    counts = {"count": len(channels), "used": used, "empty": len(channels) - used}
    return value, {**counts, "kl": sum(kl), "signal": signal}


def _gap(numbers: Numbers) -> Described:
    gap = numbers["latent_gap"]
    unseen, now, many = gap["unseen"], gap["sampled"], gap["sampled_many"]
    value = (
        f"MMD {now['share']:.1%} of what plain noise leaves ({in_words(**numbers['latent_sampler'])}; "
        f"{many['share']:.1%} with {in_words('midpoint', MANY_LATENT_STEPS)}; below {gap['noise']:.1%} it is "
        f"noise); density {now['density']:.2f} and coverage {now['coverage']:.2f} (z of held-out images: "
        f"{unseen['density']:.2f}, {unseen['coverage']:.2f})"
    )

    def fit(z: Mapping[str, float]) -> float:
        """1 where z lie as well as held-out ones, 0 where they lie as badly as can be."""
        return min(z["density"] / unseen["density"], z["coverage"] / unseen["coverage"], 1 - z["share"])

    # the share of what is missing that more steps mend
    missing = 1 - fit(now)
    return value, {"fit": fit(now), "mended": (fit(many) - fit(now)) / missing if missing > 0 else 0.0}


def _paths(numbers: Numbers) -> Described:
    error, baseline = numbers["curvature"]["error"], numbers.get("baseline_curvature")
    value = ", ".join(f"{n} step{'s' if n > 1 else ''} {error[str(n)]:.2f}" for n in STEPS)
    value += f" grey levels from {FINE_STEPS} steps (Euler, 1 step: {error['euler_1']:.2f})"
    if baseline is not None:
        value += f"; from N(0, I), 1 step: {baseline['error']['1']:.2f}"
    enough = next((n for n in STEPS if error[str(n)] <= VISIBLE), inf)
    return value, {"enough": enough, "steps": f"{enough} steps are" if enough > 1 else "1 step is"}


def _bend(numbers: Numbers) -> Described:
    paths, baseline = numbers["curvature"], numbers.get("baseline_curvature")
    profile = ", ".join(f"{value:.2f}" for value in paths["profile"])
    value = (
        f"{paths['straightness']:.3f} of the chord's energy, from start to end {profile}; chord "
        f"{paths['length']:.1f} grey levels"
    )
    bend = paths["straightness"] ** 0.5 * paths["length"]
    if baseline is None:
        return value, {"bend": bend}
    value += f"; from N(0, I) {baseline['straightness']:.3f}, chord {baseline['length']:.1f}"
    other = baseline["straightness"] ** 0.5 * baseline["length"]
    return value, {"bend": bend, "other": other, "less": other - bend}


def _one_evaluation(error: Mapping[str, float], unit: str, near: float) -> Described:
    """Describe where one step of an average velocity ends, from where many steps from the same start do."""
    one, two, euler = (error[name] for name in ("mean_1", "1", "euler_1"))
    value = (
        f"ends {one:.2f} {unit} from {in_words('midpoint', FINE_STEPS)} (1 midpoint step, two evaluations: "
        f"{two:.2f}; 1 Euler step: {euler:.2f})"
    )
    return value, {"past_near": one - near, "past_two": one - two, "past_euler": one - 0.9 * euler}
