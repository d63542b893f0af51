"""What an evaluation measures."""

from __future__ import annotations

from dataclasses import dataclass

from lediflow.errors import UserError, nearest
from lediflow.ode import check_solver
from lediflow.precision import DTYPES


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        data: DATASET of the real images, its training split: the reference.
        validation: DATASET of held-out images; None for the split of that name, if there is one.
        steps: of the flow.
        solvers: of the flow; empty for "midpoint", and "mean" before it for models that have an average
            velocity. A model without one leaves "mean" out.
        latent_solver: of the latent sampler; None for "mean" where it has an average velocity, else for the
            row's solver, or "midpoint" where that is "mean".
        latent_steps: of the latent sampler; None for 1 with "mean", else 4.
        features: feature networks; empty for CLIP, or for the classifier where CLIP cannot be had.
        num_images: generated for each row.
        reference_images: most real images that are used.
        seed: image i depends on (seed, i) only.
        batch_size: images at a time, and the batch that is timed.
        dtype: fp32, bf16 or fp16, of the models.
        bootstrap: replicates behind an interval; 0 for none.
        lpips: measure LPIPS of reconstructions too.
        classifier_steps: training steps of the classifier.
    """

    data: str
    validation: str | None = None
    steps: tuple[int, ...] = (1, 2, 4, 8)
    solvers: tuple[str, ...] = ()
    latent_solver: str | None = None
    latent_steps: int | None = None
    features: tuple[str, ...] = ()
    num_images: int = 1000
    reference_images: int = 50_000
    seed: int = 0
    batch_size: int = 64
    dtype: str = "fp32"
    bootstrap: int = 100
    lpips: bool = False
    classifier_steps: int = 400

    def __post_init__(self) -> None:
        if not self.steps:
            raise UserError("give at least one number of steps")
        for solver in self.solvers or ("midpoint",):
            for steps in self.steps:
                check_solver(solver, steps)
        check_solver(self.latent_solver or "midpoint", 1 if self.latent_steps is None else self.latent_steps)
        if self.dtype not in DTYPES:
            raise UserError(
                f"unknown dtype {self.dtype!r}{nearest(self.dtype, DTYPES)}; choose from {', '.join(DTYPES)}"
            )
        if self.num_images < 10 or self.reference_images < 10:
            raise UserError("distances between sets need at least 10 images on both sides")
        if self.batch_size < 1 or self.bootstrap < 0 or self.classifier_steps < 1:
            raise UserError("batch_size and classifier_steps must be at least 1, and bootstrap 0 or more")
