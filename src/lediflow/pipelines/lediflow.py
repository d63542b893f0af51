"""LeDiFlowPipeline: w ~ N(0, 1) -> z -> x ~ P_L -> image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from lediflow import ode
from lediflow.errors import UserError
from lediflow.networks.auxiliary import AuxiliaryModel
from lediflow.networks.velocity import VelocityTransformer
from lediflow.pipelines.base import ImagePipeline, PipelineOutput
from lediflow.pipelines.guidance import ClassLabels, settle_solver, velocity_field


class LeDiFlowPipeline(ImagePipeline):
    """Flow matching that starts at the learned prior (LeDiFlow, arXiv 2505.20723).

    Args:
        auxiliary: theta_E and theta_D.
        flow: theta_FM.
        sampler: theta_L.
        vae: codec of the latents, where the flow carries latents; None loads it when it is needed.
        latent_space: a `LatentSpace` as a dict; None for a flow of pixels.
        id2label: name of each class by its index as a string, for a model with classes.
    """

    model_cpu_offload_seq = "sampler->auxiliary->flow->vae"

    def __init__(
        self,
        auxiliary: AuxiliaryModel,
        flow: VelocityTransformer,
        sampler: VelocityTransformer,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        latent_space: dict[str, Any] | None = None,
        id2label: dict[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(auxiliary=auxiliary, flow=flow, sampler=sampler, vae=vae)
        self.register_to_config(latent_space=latent_space, id2label=id2label)

    def __call__(
        self,
        num_images: int = 1,
        *,
        steps: int | None = None,
        latent_steps: int | None = None,
        solver: str | None = None,
        latent_solver: str | None = None,
        class_labels: ClassLabels = None,
        guidance: float = 1.0,
        latent_guidance: float = 1.0,
        seed: int = 0,
        first_image: int = 0,
        batch_size: int = 64,
        dtype: torch.dtype | None = None,
        output_type: Literal["pil", "pt", "latent"] = "pil",
    ) -> PipelineOutput:
        """Make images.

        Args:
            num_images: how many.
            steps: solver steps of the flow model; None for 2, or 1 with "mean".
            latent_steps: solver steps of the latent sampler; None for 4, or 1 with "mean".
            solver: one of `ode.SOLVERS`; None for "mean" where the flow has an average velocity, otherwise
                "midpoint".
            latent_solver: of the latent sampler; None for "mean" where it has an average velocity, else for
                `solver`, or "midpoint" where that is "mean".
            class_labels: one class or several, by index or name, which the images take in turn: image i is of
                class_labels[i % len(class_labels)]. None for all classes in turn.
            guidance: of the flow model, 1 for none; any other value takes two evaluations a call.
            latent_guidance: of the latent sampler, likewise.
            seed: of the request; image i depends on (seed, i) only.
            first_image: index i of the first image, to go on with an earlier request.
            batch_size: images at a time.
            dtype: autocast to torch.bfloat16 or torch.float16; None computes as the weights are.
            output_type: "pil", or "pt" for a tensor (N, C, H, W) in [-1, 1], or "latent" for the codec's
                latents in its own units.

        Returns:
            A `PipelineOutput`; its nfe has the keys sampler, decoder and flow, and codec for decoded latents.
            A guided evaluation counts as two, with the class and without.

        Raises:
            UserError: unknown solver or class, guidance without classes, steps, num_images or batch_size
                below 1, or no codec for the latents.
        """
        settled = self.settle(
            solver=solver, steps=steps, latent_solver=latent_solver, latent_steps=latent_steps
        )
        return self._request(
            num_images,
            first_image=first_image,
            **settled,
            seed=seed,
            batch_size=batch_size,
            dtype=dtype,
            output_type=output_type,
            class_labels=class_labels,
            guidance=guidance,
            latent_guidance=latent_guidance,
        )

    def settle(self, *, solver=None, steps=None, latent_solver=None, latent_steps=None):
        """Solver and steps of flow and latent sampler; see `__call__` for what None is."""
        if latent_solver == "mean" and not self.sampler.average_velocity:
            raise UserError(
                "latent solver 'mean' needs a latent sampler with an average velocity, and this one has "
                "none; train it with `lediflow train ... --stage sampler-meanflow`, or use another, such as "
                "midpoint"
            )
        if latent_solver is None and not self.sampler.average_velocity:
            latent_solver = None if solver == "mean" else solver
        solver, steps = settle_solver(self.flow, solver, steps, 2)
        latent_solver, latent_steps = settle_solver(self.sampler, latent_solver, latent_steps, 4)
        return {
            "solver": solver,
            "steps": steps,
            "latent_solver": latent_solver,
            "latent_steps": latent_steps,
        }

    def _noise(self, indices: Sequence[int], seed: int) -> tuple[Tensor, ...]:
        w = self._draw(self.auxiliary.latent_shape, indices, seed, "w")
        return w, self._draw(self.sample_shape, indices, seed, "x")

    def _images(
        self, noise: tuple[Tensor, ...], labels: Tensor | None, *, steps: int, solver: str, **options: Any
    ) -> tuple[Tensor, dict[str, int]]:
        """w -> z -> P_L -> x -> y."""
        w, noise_x = noise
        field, latent_evaluations = velocity_field(self.sampler, None, labels, options["latent_guidance"])
        latent = ode.integrate(field, w, steps=options["latent_steps"], solver=options["latent_solver"])
        z = self.auxiliary.unstandardize(latent.end)

        x = self.auxiliary.decode(z).at(noise_x)
        field, evaluations = velocity_field(self.flow, z, labels, options["guidance"])
        image = ode.integrate(field, x, steps=steps, solver=solver)
        return image.end, {
            "sampler": latent.nfe * latent_evaluations,
            "decoder": 1,
            "flow": image.nfe * evaluations,
        }
