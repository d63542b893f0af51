"""Integrate a velocity field: solver, steps, direction, trajectory, and the count of evaluations.

torchdiffeq does the arithmetic; the solver "mean" follows an average velocity, which needs none. Here a step
count means steps (a grid of steps + 1 times), and every evaluation of the field is counted (NFE), because
that is what sampling costs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
SOLVERS = tuple(EVALUATIONS_PER_STEP)

# field(t, state), and field(t, state, r) for the average velocity over [t, r]
Field = Callable[..., Tensor]


@dataclass(frozen=True)
class Solution:
    """What `integrate` returns.

    Attributes:
        end: the state at the end of the interval, shape of the start.
        nfe: how often the field was evaluated.
        trajectory: states at the times `times`, (steps + 1, ...), or None when not asked for.
        times: the grid, (steps + 1,).
    """

    end: Tensor
    nfe: int
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


@torch.no_grad()
def integrate(
    field: Field,
    start: Tensor,
    *,
    steps: int = 2,
    solver: str = "midpoint",
    reverse: bool = False,
    trajectory: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Solution:
    """Solve d phi_t / dt = field(t, phi_t) over [0, 1] (eq. 1), without gradients.

    Args:
        field: called as field(t, state) with a scalar tensor t; returns the velocity, shape of state. For
            "mean" it is called as field(t, state, r) and returns the average velocity over [t, r].
        start: state at t = 0, or at t = 1 when `reverse`.
        steps: number of steps of a fixed-step solver; for dopri5 only the number of returned points less one.
        solver: one of `SOLVERS`. heun2 and heun3 are the 2- and 3-stage Heun methods (2 and 3 evaluations);
            "mean" steps from t to r by (r - t) u(state, t, r), which is exact for an exact u.
        reverse: integrate from t = 1 down to t = 0.
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
        nfe += 1
        return field(*point)

    # float64 times: steps of a float32 grid differ in the last digits, which costs reversibility
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=start.device)
    if reverse:
        times = times.flip(0)
    if solver == "mean":
        states = [start]
        for t, r in itertools.pairwise(times):
            states.append(states[-1] + (r - t).to(start.dtype) * counted(t, states[-1], r))
        return Solution(states[-1], nfe, torch.stack(states) if trajectory else None, times)
    if EVALUATIONS_PER_STEP[solver] is None:
        states = odeint(counted, start, times, method=solver, rtol=rtol, atol=atol)
    else:
        states = odeint(counted, start, times, method=solver)
    return Solution(states[-1], nfe, states if trajectory else None, times)
