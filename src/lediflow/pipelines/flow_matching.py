"""FlowMatchingPipeline: x ~ N(0, 1) -> image, the baseline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from lediflow import ode
from lediflow.errors import UserError
from lediflow.networks.clusters import Clusters
from lediflow.networks.velocity import VelocityTransformer
from lediflow.pipelines.codec import FORMAT, OutputType, PipelineOutput
from lediflow.pipelines.inpainting import Inpainting
from lediflow.pipelines.labels import ClassLabels, Clustering, Prompt
from lediflow.pipelines.strengths import Strength


class FlowMatchingPipeline(Inpainting):
    """Plain flow matching (rectified flow objective) from Gaussian noise.

    Args:
        flow: the velocity network, without z.
        vae: codec of the latents, where the flow carries latents; None loads it when it is needed.
        codec_space: a `CodecSpace` as a dict; None for a flow of pixels.
        id2label: name of each class by its index as a string, for a model with classes.
        clusters: of z, where the flow is told an image's cluster.
        weak_flow: a worse flow, for autoguidance.
        strengths: of guidance, and temperature, by the names of the arguments of `__call__`, where None is
            asked for.
        prompt_encoder: where the frozen encoder of texts was, and its fingerprint
            (`text_encoders.TextEncoder.record`); None for a model that is told none, or by bytes.
        format: of the saved pipeline, which is always the one that this version writes.
    """

    def __init__(
        self,
        flow: VelocityTransformer,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        codec_space: dict[str, Any] | None = None,
        id2label: dict[str, str] | None = None,
        clusters: Clusters | None = None,
        weak_flow: VelocityTransformer | None = None,
        strengths: dict[str, float] | None = None,
        prompt_encoder: dict[str, Any] | None = None,
        format: int = FORMAT,
    ):
        super().__init__()
        self.register_modules(flow=flow, vae=vae, clusters=clusters, weak_flow=weak_flow)
        self.register_to_config(
            codec_space=codec_space,
            id2label=id2label,
            strengths=strengths,
            prompt_encoder=prompt_encoder,
            format=FORMAT,
        )

    def __call__(
        self,
        num_images: int = 1,
        *,
        steps: int | None = None,
        solver: str | None = None,
        class_labels: ClassLabels = None,
        cluster: Clustering = None,
        prompt: Prompt = None,
        guidance: float | None = None,
        autoguidance: float | None = None,
        temperature: float | None = None,
        seed: int = 0,
        first_image: int = 0,
        batch_size: int = 64,
        dtype: torch.dtype | None = None,
        output_type: OutputType = "pil",
    ) -> PipelineOutput:
        """Make images; arguments as in `LeDiFlowPipeline`, without a latent sampler.

        The default is 8 midpoint steps, or one evaluation of the average velocity where the flow has it.

        Returns:
            A `PipelineOutput`; its nfe has the key flow, and codec for decoded latents.

        Raises:
            UserError: unknown solver, class or cluster, a prompt for a model without texts, guidance that the
                model cannot have, steps, num_images or batch_size below 1, or no codec for the latents.
        """
        return self._join(
            self.stream(
                num_images,
                solver=solver,
                steps=steps,
                class_labels=class_labels,
                cluster=cluster,
                prompt=prompt,
                guidance=guidance,
                autoguidance=autoguidance,
                temperature=temperature,
                seed=seed,
                first_image=first_image,
                batch_size=batch_size,
                dtype=dtype,
                output_type=output_type,
            )
        )

    def settle(self, *, solver=None, steps=None, latent_solver=None, latent_steps=None):
        """Solver and steps; there is no latent sampler."""
        solver, steps = ode.settle_solver(self.flow, solver, steps, 8)
        return {"solver": solver, "steps": steps}

    def _draw(self, indices, seed):
        return (self.noise(self.sample_shape, indices, seed, "x"),)

    def strengths(self):
        """Guidance of the flow, and the temperature of its noise."""
        weak = Strength(self.flow, "autoguidance", self.weak_flow, "weak-baseline")
        return {**super().strengths(), "autoguidance": weak}

    def _source(self, y, indices, seed, labels, *, strength=0.0, constant_noise=False, **_latent):
        """x ~ N(0, 1), whatever the picture is."""
        if strength or constant_noise:
            raise UserError(
                "plain flow matching has no latent z to change: leave strength at 0 and constant_noise out"
            )
        return self.temperature * self.noise(self.sample_shape, indices, seed, "x"), labels, {}

    def _make(self, noise, labels, *, steps, solver, guidance=1.0, autoguidance=1.0, temperature=1.0):
        field = self.flow_field(labels, guidance, autoguidance)
        solution = ode.integrate(field, temperature * noise[0], steps=steps, solver=solver)
        return solution.end, {"flow": solution.nfe}
