"""Which solvers and steps a request takes, settled before it is made, so that outputs can tell them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lediflow.errors import UserError
from lediflow.ode import EVALUATIONS_PER_STEP
from lediflow.pipelines.base import ImagePipeline
from lediflow.pipelines.guidance import settle_solver
from lediflow.pipelines.lediflow import LeDiFlowPipeline


def settled(
    pipeline: ImagePipeline,
    *,
    solver: str | None = None,
    steps: int | None = None,
    latent_solver: str | None = None,
    latent_steps: int | None = None,
) -> dict[str, Any]:
    """Return a pipeline's arguments with the solvers and steps that it takes where None is given.

    Args:
        pipeline: the model.
        solver: of the flow.
        steps: of the flow.
        latent_solver: of the latent sampler.
        latent_steps: of the latent sampler.

    Returns:
        "solver" and "steps", and for a model with a latent sampler "latent_solver" and "latent_steps". What
        is given for a latent sampler that is not there is left out.

    Raises:
        UserError: unknown solver, steps below 1, or "mean" for a network without average velocity.
    """
    if not isinstance(pipeline, LeDiFlowPipeline):
        solver, steps = settle_solver(pipeline.flow, solver, steps, 8)
        return {"solver": solver, "steps": steps}
    if latent_solver == "mean" and not pipeline.sampler.average_velocity:
        raise UserError(
            "latent solver 'mean' needs a latent sampler with an average velocity, and this one has none; "
            "train it with `lediflow train ... --stage sampler-meanflow`, or use another, such as midpoint"
        )
    if latent_solver is None and not pipeline.sampler.average_velocity:
        latent_solver = None if solver == "mean" else solver
    solver, steps = settle_solver(pipeline.flow, solver, steps, 2)
    latent_solver, latent_steps = settle_solver(pipeline.sampler, latent_solver, latent_steps, 4)
    return {
        "solver": solver,
        "steps": steps,
        "latent_solver": latent_solver,
        "latent_steps": latent_steps,
    }


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
