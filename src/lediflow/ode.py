"""Integrate a velocity field: solver, steps, direction, trajectory, and the count of evaluations.

torchdiffeq does the arithmetic. Here a step count means steps (a grid of steps + 1 times), and every
evaluation of the field is counted (NFE), because that is what sampling costs.
"""

from __future__ import annotations

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
}
SOLVERS = tuple(EVALUATIONS_PER_STEP)

Field = Callable[[Tensor, Tensor], Tensor]


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
        field: called as field(t, state) with a scalar tensor t; returns the velocity, shape of state.
        start: state at t = 0, or at t = 1 when `reverse`.
        steps: number of steps of a fixed-step solver; for dopri5 only the number of returned points less one.
        solver: one of `SOLVERS`. heun2 and heun3 are the 2- and 3-stage Heun methods (2 and 3 evaluations).
        reverse: integrate from t = 1 down to t = 0.
        trajectory: also return the state at every grid time.
        rtol: relative tolerance, dopri5 only.
        atol: absolute tolerance, dopri5 only.

    Returns:
        A `Solution` with the end state, the number of evaluations, and the grid.

    Raises:
        UserError: unknown solver, or steps below 1.
    """
    from torchdiffeq import odeint

    check_solver(solver, steps)
    nfe = 0

    def counted(t: Tensor, state: Tensor) -> Tensor:
        nonlocal nfe
        nfe += 1
        return field(t, state)

    # float64 times: steps of a float32 grid differ in the last digits, which costs reversibility
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device="cpu").to(start.device)
    if reverse:
        times = times.flip(0)
    if EVALUATIONS_PER_STEP[solver] is None:
        states = odeint(counted, start, times, method=solver, rtol=rtol, atol=atol)
    else:
        states = odeint(counted, start, times, method=solver)
    return Solution(states[-1], nfe, states if trajectory else None, times)
