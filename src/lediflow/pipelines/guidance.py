"""Class labels of a request, and classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lediflow.errors import UserError, nearest
from lediflow.networks.velocity import VelocityTransformer
from lediflow.ode import Field, check_solver

ClassLabels = int | str | Sequence[int | str] | None


def velocity_field(
    network: VelocityTransformer,
    z: Tensor | None = None,
    class_labels: Tensor | None = None,
    guidance: float = 1.0,
) -> tuple[Field, int]:
    """Return the field to integrate, and how many evaluations of the network each of its calls is.

    v = v_none + guidance * (v_class - v_none). With guidance 1 that is v_class, one evaluation; otherwise the
    two are computed as one batch of twice the size and counted as two.

    Args:
        network: theta_FM, theta_L or the baseline.
        z: auxiliary latent, (B, c, h, w), where the network has one.
        class_labels: (B,), where the network has classes.
        guidance: 1 for none, more for a stronger resemblance to the class and less variety.

    Raises:
        UserError: guidance without classes.
    """
    if guidance == 1:
        return lambda t, state, r=None: network(state, t, z, class_labels, r), 1
    if class_labels is None:
        raise UserError(f"guidance {guidance:g} needs a model with classes; leave it at 1")
    both = torch.cat((torch.full_like(class_labels, network.num_classes), class_labels))
    twice = None if z is None else torch.cat((z, z))

    def guided(t: Tensor, state: Tensor, r: Tensor | None = None) -> Tensor:
        none, with_class = network(torch.cat((state, state)), t, twice, both, r).chunk(2)
        return torch.lerp(none, with_class, guidance)

    return guided, 2


def settle_solver(
    network: VelocityTransformer, solver: str | None, steps: int | None, default_steps: int
) -> tuple[str, int]:
    """Return solver and steps, by default one step of the average velocity where the network has it.

    Args:
        network: theta_FM, theta_L or the baseline.
        solver: one of `ode.SOLVERS`; None for "mean" where it can be, and "midpoint" otherwise.
        steps: None for 1 with "mean", and `default_steps` otherwise.
        default_steps: of a network that has only a velocity.

    Raises:
        UserError: unknown solver, steps below 1, or "mean" for a network without average velocity.
    """
    solver = solver or ("mean" if network.average_velocity else "midpoint")
    steps = (1 if solver == "mean" else default_steps) if steps is None else steps
    check_solver(solver, steps)
    if solver == "mean" and not network.average_velocity:
        raise UserError(
            "solver 'mean' needs an average velocity, and this model has none; train it with "
            "`lediflow train ... --stage meanflow` (sampler-meanflow for the latent sampler, "
            "baseline-meanflow for plain flow matching), or use another solver, such as midpoint"
        )
    return solver, steps


def check_labels(
    class_labels: ClassLabels, num_classes: int, id2label: Mapping[str, str] | None
) -> list[int]:
    """Return the classes that the images of a request take in turn, empty for a model without classes.

    Args:
        class_labels: one class or several, by index or name; None for all.
        num_classes: of the model.
        id2label: name of each index, where known.

    Raises:
        UserError: an unknown class, no class, or a model without classes.
    """
    if not num_classes:
        if class_labels is not None:
            raise UserError("this model was trained without classes; leave class_labels out")
        return []
    if class_labels is None:
        return list(range(num_classes))
    single = isinstance(class_labels, int | str)
    wanted: Sequence[int | str] = [class_labels] if single else list(class_labels)  # type: ignore[list-item, arg-type]
    if not wanted:
        raise UserError("class_labels must name at least one class")
    return [_index(label, num_classes, id2label or {}) for label in wanted]


def _index(label: int | str, num_classes: int, id2label: Mapping[str, str]) -> int:
    by_name = {name: int(index) for index, name in id2label.items()}
    if isinstance(label, str) and label in by_name:
        return by_name[label]
    if isinstance(label, str) and not label.isdecimal():
        known = f"; choose from {', '.join(list(by_name)[:20])}" if by_name else "; give its index"
        raise UserError(f"unknown class {label!r}{nearest(label, by_name)}{known}")
    if not 0 <= int(label) < num_classes:
        raise UserError(f"class {label} is not one of this model's 0 to {num_classes - 1}")
    return int(label)
