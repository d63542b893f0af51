"""What diagnostics.py measures, in words: a verdict for each number, and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lediflow.evaluation.diagnostics import FINE_STEPS, MANY_LATENT_STEPS, STEPS
from lediflow.evaluation.sampling import in_words

Grade = Literal["good", "fair", "poor"]
VISIBLE = 3.0  # grey levels of 255, root mean square: below that two images look the same
NEAR_Z = 0.1  # standard deviations of z, root mean square: below that two z mean the same image
ACTIVE = 0.01  # variance of q's mean over images above which a channel of z is used


@dataclass(frozen=True)
class Finding:
    """One number, judged.

    Attributes:
        name: what was measured.
        value: as text, with its unit.
        grade: good, fair or poor.
        says: the verdict in a sentence.
        change: what to change; empty where nothing is to be.
    """

    name: str
    value: str
    grade: Grade
    says: str
    change: str = ""


def findings(numbers: Mapping[str, Any]) -> list[Finding]:
    """Judge every number."""
    found = [
        _transport(numbers["transport"]),
        _calibration(numbers["calibration"], numbers["calibration_train"]),
        _floor(numbers["sigma"]),
        _channels(numbers["channels"]),
        _gap(numbers["latent_gap"], numbers["latent_sampler"]),
        _paths(numbers["curvature"], numbers.get("baseline_curvature")),
        _straightness(numbers["curvature"], numbers.get("baseline_curvature")),
    ]
    if "mean_1" in numbers["curvature"]["error"]:
        error = numbers["curvature"]["error"]
        found.append(_one_evaluation("the flow", error, "grey levels", VISIBLE, "meanflow (or distill)"))
    if "sampler_curvature" in numbers:
        error, stage = numbers["sampler_curvature"]["error"], "sampler-meanflow"
        found.append(_one_evaluation("the latent sampler", error, "sigma of z", NEAR_Z, stage))
    return found


def verdict(numbers: Mapping[str, Any], found: list[Finding]) -> str:
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


def _transport(cost: Mapping[str, float]) -> Finding:
    share = cost["learned"] / cost["gaussian"]
    value = (
        f"{cost['learned']:.4g} from P_L, {cost['per_pixel_gaussian']:.4g} from a Gaussian per pixel, "
        f"{cost['gaussian']:.4g} from N(0, I)"
    )
    name = "transport cost E|y - x|² per element"
    if share >= 1 or cost["learned"] >= cost["per_pixel_gaussian"]:
        return Finding(
            name,
            value,
            "poor",
            "z tells nothing of the image: the prior is no better than one without z.",
            "Train the auxiliary stage longer; if it has converged, lower beta or enlarge z "
            "(auxiliary.latent_channels, latent_size).",
        )
    if cost["learned"] > 0.5 * cost["per_pixel_gaussian"]:
        return Finding(
            name,
            value,
            "fair",
            f"The start is {1 / share:.1f} times nearer than noise, but z explains less than half of what "
            "can vary.",
            "Lower beta, enlarge z, or train the auxiliary stage longer.",
        )
    return Finding(name, value, "good", f"The start is {1 / share:.1f} times nearer than noise.")


def _calibration(unseen: Mapping[str, float], train: Mapping[str, float]) -> Finding:
    spread, name = unseen["residual_std"], "calibration of sigma on held-out images"
    value = (
        f"residuals of {spread:.3f} sigma ({train['residual_std']:.3f} in training), "
        f"{unseen['within_1_sigma']:.1%} within 1 sigma (68.3% if Gaussian), "
        f"{unseen['within_2_sigma']:.1%} within 2 (95.4%)"
    )
    if spread > 1.1 and spread > 1.05 * train["residual_std"]:
        return Finding(
            name,
            value,
            "poor" if spread > 1.5 else "fair",
            "sigma is too small on new images but not on the training images: the auxiliary model has "
            "learnt its images by heart.",
            "Train the auxiliary stage for fewer steps, on more images, or with a higher beta.",
        )
    if not 0.9 <= spread <= 1.1:
        small = "small" if spread > 1 else "large"
        return Finding(
            name,
            value,
            "poor" if not 0.67 <= spread <= 1.5 else "fair",
            f"sigma is too {small} on average.",
            "Train the auxiliary stage longer: its loss is least where sigma is honest.",
        )
    return Finding(name, value, "good", "sigma is honest on average.")


def _floor(sigma: Mapping[str, float]) -> Finding:
    share = sigma["share_at_floor"]
    value = f"{share:.2%} of elements at {sigma['floor']:.3g}; median sigma {sigma['median']:.3g}"
    if share < 0.01:
        return Finding("sigma at its floor", value, "good", "The prior keeps its width nearly everywhere.")
    return Finding(
        "sigma at its floor",
        value,
        "fair" if share < 0.1 else "poor",
        "Where sigma is at its floor the prior is almost a point, and the flow has nothing to move.",
        "Harmless where images have a constant background; otherwise raise beta or shrink z, so that z "
        "does not hold the last detail.",
    )


def _channels(channels: list[Mapping[str, float]]) -> Finding:
    used = [c for c in channels if c["spread"] > ACTIVE]
    kl = sum(c["kl"] for c in channels)
    value = (
        f"{len(used)} of {len(channels)} channels used; KL by channel "
        + ", ".join(f"{c['kl']:.1f}" for c in channels)
        + " nats per image"
    )
    name = "posterior collapse of z"
    if not used:
        return Finding(
            name, value, "poor", "z is empty: every channel is noise.", "Lower beta by a factor of 4 or more."
        )
    if len(used) < len(channels):
        return Finding(
            name,
            value,
            "fair",
            f"{len(channels) - len(used)} channels carry nothing and cost time in the latent sampler.",
            "Lower beta to fill them, or take fewer auxiliary.latent_channels.",
        )
    if min(c["signal"] for c in channels) > 0.99:
        return Finding(
            name,
            value,
            "fair",
            f"z is nearly without noise ({kl:.0f} nats per image), which is hard to sample.",
            "Raise beta.",
        )
    return Finding(name, value, "good", "Every channel carries something, and none is without noise.")


def _gap(gap: Mapping[str, Any], sampler: Mapping[str, Any]) -> Finding:
    unseen, now, many = gap["unseen"], gap["sampled"], gap["sampled_many"]
    value = (
        f"MMD {now['share']:.1%} of what plain noise leaves ({in_words(**sampler)}; {many['share']:.1%} "
        f"with {in_words('midpoint', MANY_LATENT_STEPS)}; below {gap['noise']:.1%} it is noise); density "
        f"{now['density']:.2f} and coverage {now['coverage']:.2f} (z of held-out images: "
        f"{unseen['density']:.2f}, {unseen['coverage']:.2f})"
    )
    name = "gap between sampled z and encoded z"

    def fit(z: Mapping[str, float]) -> float:
        """1 where z lie as well as held-out ones, 0 where they lie as badly as can be."""
        return min(z["density"] / unseen["density"], z["coverage"] / unseen["coverage"], 1 - z["share"])

    if fit(now) >= 0.9:
        return Finding(name, value, "good", "Sampled z lie where encoded z do.")
    if fit(many) - fit(now) > 0.5 * (1 - fit(now)):
        return Finding(
            name,
            value,
            "fair",
            "The latent sampler is good, but takes too few steps.",
            "Take more --latent-steps.",
        )
    return Finding(
        name,
        value,
        "fair" if fit(now) > 0.6 else "poor",
        "Sampled z lie off the encoded ones, and more steps do not mend it: images start from wrong z.",
        "Train the sampler stage longer or widen it; or raise beta or shrink z, which makes z easier.",
    )


def _paths(paths: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> Finding:
    error = paths["error"]
    value = ", ".join(f"{n} step{'s' if n > 1 else ''} {error[str(n)]:.2f}" for n in STEPS)
    value += f" grey levels from {FINE_STEPS} steps (Euler, 1 step: {error['euler_1']:.2f})"
    if baseline is not None:
        value += f"; from N(0, I), 1 step: {baseline['error']['1']:.2f}"
    enough = next((n for n in STEPS if error[str(n)] <= VISIBLE), None)
    name = "endpoint error of few midpoint steps"
    if enough is None:
        return Finding(
            name,
            value,
            "poor",
            f"Even {STEPS[-1]} steps end visibly elsewhere than many.",
            "Train the flow stage longer; if it has converged, improve the prior (lower beta, larger z).",
        )
    steps = f"{enough} steps are" if enough > 1 else "1 step is"
    says = f"{steps} enough: more change less than {VISIBLE:g} grey levels."
    if enough <= 2:
        return Finding(name, value, "good", says)
    return Finding(
        name, value, "fair", says, f"Sample with --steps {enough}, or train the flow stage longer."
    )


def _straightness(paths: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> Finding:
    profile = ", ".join(f"{value:.2f}" for value in paths["profile"])
    value = (
        f"{paths['straightness']:.3f} of the chord's energy, from start to end {profile}; chord "
        f"{paths['length']:.1f} grey levels"
    )
    if baseline is not None:
        value += f"; from N(0, I) {baseline['straightness']:.3f}, chord {baseline['length']:.1f}"
    bend = paths["straightness"] ** 0.5 * paths["length"]
    says = f"Velocities stray from the straight line by {bend:.1f} grey levels."
    if baseline is None:
        return Finding("bend of the paths", value, "good" if bend < 4 * VISIBLE else "fair", says)
    other = baseline["straightness"] ** 0.5 * baseline["length"]
    says += f" From N(0, I) it is {other:.1f}."
    if bend < other:
        return Finding("bend of the paths", value, "good", says)
    return Finding(
        "bend of the paths",
        value,
        "poor",
        says + " The prior does not make the flow's work easier.",
        "Train the flow stage longer, or improve the prior.",
    )


def _one_evaluation(part: str, error: Mapping[str, float], unit: str, near: float, stage: str) -> Finding:
    """Judge where one step of an average velocity ends, from where many steps from the same start do."""
    one, two, euler = (error[name] for name in ("mean_1", "1", "euler_1"))
    name = f"one evaluation of {part}"
    value = (
        f"ends {one:.2f} {unit} from {in_words('midpoint', FINE_STEPS)} (1 midpoint step, two evaluations: "
        f"{two:.2f}; 1 Euler step: {euler:.2f})"
    )
    if one <= near:
        return Finding(name, value, "good", "One evaluation ends where many do.")
    if one <= two:
        return Finding(name, value, "good", "One evaluation ends as near as the two of a midpoint step.")
    change = f"Train the stage {stage} longer; until then a midpoint step, two evaluations, is better."
    if one < 0.9 * euler:
        return Finding(
            name, value, "fair", "One evaluation helps, but two of a midpoint step end nearer.", change
        )
    return Finding(
        name,
        value,
        "poor",
        "One evaluation ends no nearer than an Euler step: the average velocity is not learnt.",
        change,
    )
