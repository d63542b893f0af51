"""The solvers and steps of a request in words, for outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lediflow.ode import EVALUATIONS_PER_STEP


def in_words(solver: str, steps: int) -> str:
    """Return a solver and its steps as text: "1 mean step", "4 midpoint steps", or "dopri5"."""
    if EVALUATIONS_PER_STEP[solver] is None:
        return solver
    return f"{steps} {solver} step{'s' if steps > 1 else ''}"


def latent_words(options: Mapping[str, Any]) -> str:
    """Return the latent sampler's solver and steps as text, empty for a model without one."""
    if options.get("latent_solver") is None:
        return ""
    return in_words(options["latent_solver"], options["latent_steps"])
