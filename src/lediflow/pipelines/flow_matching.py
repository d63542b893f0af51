"""FlowMatchingPipeline: x ~ N(0, 1) -> image, the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from lediflow import ode
from lediflow.networks.velocity import VelocityTransformer
from lediflow.pipelines.base import ImagePipeline, PipelineOutput
from lediflow.pipelines.guidance import ClassLabels, settle_solver, velocity_field


class FlowMatchingPipeline(ImagePipeline):
    """Plain flow matching (rectified flow objective) from Gaussian noise.

    Args:
        flow: the velocity network, without z.
        vae: codec of the latents, where the flow carries latents; None loads it when it is needed.
        latent_space: a `LatentSpace` as a dict; None for a flow of pixels.
        id2label: name of each class by its index as a string, for a model with classes.
    """

    model_cpu_offload_seq = "flow->vae"

    def __init__(
        self,
        flow: VelocityTransformer,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        latent_space: dict[str, Any] | None = None,
        id2label: dict[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(flow=flow, vae=vae)
        self.register_to_config(latent_space=latent_space, id2label=id2label)

    def __call__(
        self,
        num_images: int = 1,
        *,
        steps: int | None = None,
        solver: str | None = None,
        class_labels: ClassLabels = None,
        guidance: float = 1.0,
        seed: int = 0,
        first_image: int = 0,
        batch_size: int = 64,
        dtype: torch.dtype | None = None,
        output_type: Literal["pil", "pt", "latent"] = "pil",
    ) -> PipelineOutput:
        """Make images; arguments as in `LeDiFlowPipeline`, without a latent sampler.

        The default is 8 midpoint steps, or one evaluation of the average velocity where the flow has it.

        Returns:
            A `PipelineOutput`; its nfe has the key flow, and codec for decoded latents.

        Raises:
            UserError: unknown solver or class, guidance without classes, steps, num_images or batch_size
                below 1, or no codec for the latents.
        """
        return self._request(
            num_images,
            first_image=first_image,
            **self.settle(solver=solver, steps=steps),
            seed=seed,
            batch_size=batch_size,
            dtype=dtype,
            output_type=output_type,
            class_labels=class_labels,
            guidance=guidance,
        )

    def settle(self, *, solver=None, steps=None, latent_solver=None, latent_steps=None):
        """Solver and steps; there is no latent sampler."""
        solver, steps = settle_solver(self.flow, solver, steps, 8)
        return {"solver": solver, "steps": steps}

    def _noise(self, indices: Sequence[int], seed: int) -> tuple[Tensor, ...]:
        return (self._draw(self.sample_shape, indices, seed, "x"),)

    def _images(
        self, noise: tuple[Tensor, ...], labels: Tensor | None, *, steps: int, solver: str, **options: Any
    ) -> tuple[Tensor, dict[str, int]]:
        field, evaluations = velocity_field(self.flow, None, labels, options["guidance"])
        solution = ode.integrate(field, noise[0], steps=steps, solver=solver)
        return solution.end, {"flow": solution.nfe * evaluations}
