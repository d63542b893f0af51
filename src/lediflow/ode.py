"""Integrate a velocity field: solver, steps, direction, trajectory, and the count of evaluations.

torchdiffeq does the arithmetic; the solver "mean" follows an average velocity, which needs none. Here a step
count means steps (a grid of steps + 1 times), and every evaluation of the field is counted (NFE), because
that is what sampling costs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lediflow.choices import SOLVERS
from lediflow.devices import finest_float
from lediflow.errors import UserError, nearest

# evaluations of the field per step; dopri5 chooses its own steps
EVALUATIONS_PER_STEP: dict[str, int | None] = {
    "euler": 1,
    "midpoint": 2,
    "heun2": 2,
    "heun3": 3,
    "rk4": 4,
    "dopri5": None,
    "mean": 1,
}

# field(t, state), and field(t, state, r) for the average velocity over [t, r]
Field = Callable[..., Tensor]


@dataclass(frozen=True)
class Solution:
    """What `integrate` returns.

    Attributes:
        end: the state at the end of the interval, shape of the start.
        nfe: evaluations of the network for one image; of "dopri5" their mean over the images.
        trajectory: states at the times `times`, (steps + 1, ...), or None when not asked for.
        times: the grid, (steps + 1,).
    """

    end: Tensor
    nfe: float
    trajectory: Tensor | None
    times: Tensor


def check_solver(solver: str, steps: int) -> None:
    """Refuse an unknown solver or a step count below 1.

    Raises:
        UserError: naming what is wrong and the nearest valid name.
    """
    if solver not in EVALUATIONS_PER_STEP:
        raise UserError(
            f"unknown solver {solver!r}{nearest(solver, SOLVERS)}; choose from {', '.join(SOLVERS)}"
        )
    if steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")


def in_words(solver: str, steps: int) -> str:
    """Return a solver and its steps as text: "1 mean step", "4 midpoint steps", or "dopri5"."""
    if EVALUATIONS_PER_STEP[solver] is None:
        return solver
    return f"{steps} {solver} step{'s' if steps > 1 else ''}"


def settle_solver(network: Any, solver: str | None, steps: int | None, default_steps: int) -> tuple[str, int]:
    """Return solver and steps, by default one step of the average velocity where the network has it.

    Args:
        network: whose field is integrated; its `average_velocity` is read.
        solver: one of `SOLVERS`; None for "mean" where it can be, and "midpoint" otherwise.
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


@torch.no_grad()
def integrate(
    field: Field,
    start: Tensor,
    *,
    steps: int = 2,
    solver: str = "midpoint",
    reverse: bool = False,
    begin: float = 0.0,
    trajectory: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Solution:
    """Solve d phi_t / dt = field(t, phi_t) over [begin, 1] (eq. 1), without gradients.

    "dopri5" chooses its steps by the error of the whole state, so a field of `fields.py` is integrated image
    by image: what becomes of an image does not depend on the others of its batch.

    Args:
        field: called as field(t, state) with a scalar tensor t; returns the velocity, shape of state. For
            "mean" it is called as field(t, state, r) and returns the average velocity over [t, r]. Its
            attribute `evaluations`, where it has one (fields.py), says how many evaluations of the network
            each call is.
        start: state at t = begin, or at t = 1 when `reverse`.
        steps: number of steps of a fixed-step solver; for dopri5 only the number of returned points less one.
        solver: one of `SOLVERS`. heun2 and heun3 are the 2- and 3-stage Heun methods (2 and 3 evaluations);
            "mean" steps from t to r by (r - t) u(state, t, r), which is exact for an exact u.
        reverse: integrate from t = 1 down to t = begin.
        begin: where the interval begins, from 0 to below 1.
        trajectory: also return the state at every grid time.
        rtol: relative tolerance, dopri5 only.
        atol: absolute tolerance, dopri5 only.

    Returns:
        A `Solution` with the end state, the number of evaluations, and the grid.

    Raises:
        UserError: unknown solver, steps below 1, or "mean" in reverse, for which no u is learned (r < t).
    """
    from torchdiffeq import odeint

    check_solver(solver, steps)
    if reverse and solver == "mean":
        raise UserError("solver 'mean' only goes from the source to the data; use another one in reverse")
    nfe = 0

    def counted(*point: Tensor) -> Tensor:
        nonlocal nfe
        nfe += getattr(field, "evaluations", 1)
        return field(*point)

    # float64 times: steps of a float32 grid differ in the last digits, which costs reversibility
    times = torch.linspace(begin, 1, steps + 1, dtype=finest_float(start.device), device=start.device)
    if reverse:
        times = times.flip(0)
    adaptive = EVALUATIONS_PER_STEP[solver] is None
    if adaptive and len(start) > 1 and hasattr(field, "rows"):
        options = {"steps": steps, "reverse": reverse, "begin": begin, "trajectory": trajectory}
        options |= {"rtol": rtol, "atol": atol}
        alone = [
            integrate(field.rows([i]), start[i : i + 1], solver=solver, **options) for i in range(len(start))
        ]
        whole = None if not trajectory else torch.cat([one.trajectory for one in alone], dim=1)
        nfe = sum(one.nfe for one in alone) / len(alone)
        return Solution(torch.cat([one.end for one in alone]), nfe, whole, times)
    if solver == "mean":
        states = [start]
        for t, r in itertools.pairwise(times):
            states.append(states[-1] + (r - t).to(start.dtype) * counted(t, states[-1], r))
        return Solution(states[-1], nfe, torch.stack(states) if trajectory else None, times)
    if adaptive:
        states = odeint(counted, start, times, method=solver, rtol=rtol, atol=atol)
    else:
        states = odeint(counted, start, times, method=solver)
    return Solution(states[-1], nfe, states if trajectory else None, times)
