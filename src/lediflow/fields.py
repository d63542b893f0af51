"""What is integrated: velocity fields made of a network and its conditions.

A field is called as field(t, state) for the velocity and, where the network has an average velocity, as
field(t, state, r) for that over [t, r] (see `ode.integrate`). Guidance is linear in the velocities, so it is
exact for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lediflow.conditions import NOTHING, Conditions

Strength: TypeAlias = float | Tensor  # of guidance: one for all images, or one for each, (B,)


@dataclass(frozen=True)
class Field:
    """A velocity field.

    Attributes:
        at: (t, state, r or None) -> velocity, shape of state.
        rows: index -> the field of some of the images, as `Conditions.rows`.
        evaluations: of the network, for each call.
    """

    at: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    rows: Callable[[Any], Field]
    evaluations: int = 1

    def __call__(self, t: Tensor, state: Tensor, r: Tensor | None = None) -> Tensor:
        """Return the velocity at `state` (B, ...), or the average velocity from t to r."""
        return self.at(t, state, r)


def conditional(network: Any, conditions: Conditions = NOTHING) -> Field:
    """Return v(x, t | conditions): the network as it is.

    Args:
        network: a velocity network (see `networks.model.VelocityNetwork`).
        conditions: a row for each image, (B, ...) each.
    """
    return Field(
        lambda t, state, r: network(state, t, conditions, r),
        rows=lambda index: conditional(network, conditions.rows(index)),
    )


def guided(
    network: Any,
    conditions: Conditions,
    guidance: Strength = 1.0,
    *,
    drop: str | Sequence[str] = "label",
    weak: Any = None,
    autoguidance: Strength = 1.0,
) -> Field:
    """Return v + (guidance - 1) (v - v_none) + (autoguidance - 1) (v - v_weak).

    v_none lacks some conditions (classifier-free guidance, arXiv 2207.12598); v_weak is that of a worse
    network of the same data (autoguidance, arXiv 2406.02507). A strength of 1 leaves its part out. v and
    v_none are computed as one batch of twice the size, and every part counts as an evaluation.

    Args:
        network: a velocity network.
        conditions: a row for each image.
        guidance: 1 for none; more for a stronger resemblance to the condition and less variety. One number,
            or one for each image, (B,).
        drop: names of the conditions that v_none lacks.
        weak: the worse network; it is told those of the conditions that it has.
        autoguidance: 1 for none; more to go further from what the weak network does. Likewise.

    Raises:
        KeyError: there is no such condition.
        ValueError: autoguidance without a weak network.
    """
    by_label, by_weak = _acts(guidance), _acts(autoguidance)
    if not by_label and not by_weak:
        return conditional(network, conditions)
    both = plain_and_guided(network, conditions, guidance, drop=drop, weak=weak, autoguidance=autoguidance)

    def rows(index: Any) -> Field:
        some = {"guidance": _rows(guidance, index), "autoguidance": _rows(autoguidance, index)}
        return guided(network, conditions.rows(index), drop=drop, weak=weak, **some)

    return Field(lambda t, state, r: both(t, state, r)[1], rows, evaluations=1 + by_label + by_weak)


def plain_and_guided(
    network: Any,
    conditions: Conditions,
    guidance: Strength = 1.0,
    *,
    drop: str | Sequence[str] = "label",
    weak: Any = None,
    autoguidance: Strength = 1.0,
) -> Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """Return what gives v and the guided velocity at once, (t, state, r) -> two of the shape of state.

    Arguments and errors as for `guided`.
    """
    by_label, by_weak = _acts(guidance), _acts(autoguidance)
    if by_weak and weak is None:
        raise ValueError("autoguidance needs a weak network")
    both = Conditions.cat((conditions.drop(drop), conditions)) if by_label else conditions
    told = conditions.only(weak.config.get("conditions") or ()) if by_weak else NOTHING

    def at(t: Tensor, state: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor]:
        if not by_label:
            given = velocity = network(state, t, conditions, r)
        else:
            none, given = network(torch.cat((state, state)), _twice(t), both, _twice(r)).chunk(2)
            velocity = torch.lerp(none, given, _each(guidance, given))
        if by_weak:
            velocity = velocity + (_each(autoguidance, given) - 1) * (given - weak(state, t, told, r))
        return given, velocity

    return at


def inpainted(field: Field, generate: Tensor, straight: Tensor) -> Field:
    """Return the field of inpainting, eq. 7: that of the network where to generate, y - x elsewhere.

    Elsewhere the way from x to y is a straight line, so the average velocity there is y - x as well: eq. 7 is
    exact for it too.

    Args:
        field: of the network.
        generate: where m = 1, bool, (B, 1, H, W).
        straight: y - x, (B, C, H, W), the known image less the source sample.
    """
    return Field(
        lambda t, state, r: torch.where(generate, field(t, state, r), straight),
        rows=lambda index: inpainted(field.rows(index), generate[index], straight[index]),
        evaluations=field.evaluations,
    )


def _acts(strength: Strength) -> bool:
    return isinstance(strength, Tensor) or strength != 1


def _each(strength: Strength, like: Tensor) -> Tensor:
    """A strength as a tensor that multiplies images."""
    if isinstance(strength, Tensor):
        return strength.to(like).view(-1, *[1] * (like.ndim - 1))
    return like.new_tensor(strength)


def _rows(strength: Strength, index: Any) -> Strength:
    return strength[index] if isinstance(strength, Tensor) else strength


def _twice(times: Any) -> Any:
    """Times for two batches; those that all images share stay."""
    return torch.cat((times, times)) if isinstance(times, Tensor) and times.ndim else times
