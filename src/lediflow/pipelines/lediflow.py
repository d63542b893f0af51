"""LeDiFlowPipeline: w ~ N(0, 1) -> z -> x ~ P_L -> image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from lediflow import ode
from lediflow.conditions import NOTHING, Conditions
from lediflow.errors import UserError
from lediflow.gaussian import DiagonalGaussian
from lediflow.networks.auxiliary import AuxiliaryModel
from lediflow.networks.clusters import Clusters
from lediflow.networks.velocity import VelocityTransformer
from lediflow.pipelines.anonymize import Anonymizing
from lediflow.pipelines.codec import FORMAT, OutputType, PipelineOutput
from lediflow.pipelines.editing import Editing
from lediflow.pipelines.labels import ClassLabels, Clustering, Prompt
from lediflow.pipelines.strengths import Strength


class LeDiFlowPipeline(Anonymizing, Editing):
    """Flow matching that starts at the learned prior (LeDiFlow, arXiv 2505.20723).

    Args:
        auxiliary: theta_E and theta_D.
        flow: theta_FM.
        sampler: theta_L.
        vae: codec of the latents, where the flow carries latents; None loads it when it is needed.
        codec_space: a `CodecSpace` as a dict; None for a flow of pixels.
        id2label: name of each class by its index as a string, for a model with classes.
        clusters: of z, where flow or sampler are told an image's cluster.
        weak_flow: a worse flow, for autoguidance.
        weak_sampler: a worse latent sampler, for autoguidance.
        strengths: of guidance, and temperature, by the names of the arguments of `__call__`, where None is
            asked for.
        prompt_encoder: where the frozen encoder of texts was, and its fingerprint
            (`text_encoders.TextEncoder.record`); None for a model that is told none, or by bytes.
        format: of the saved pipeline, which is always the one that this version writes.
    """

    def __init__(
        self,
        auxiliary: AuxiliaryModel,
        flow: VelocityTransformer,
        sampler: VelocityTransformer,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        codec_space: dict[str, Any] | None = None,
        id2label: dict[str, str] | None = None,
        clusters: Clusters | None = None,
        weak_flow: VelocityTransformer | None = None,
        weak_sampler: VelocityTransformer | None = None,
        strengths: dict[str, float] | None = None,
        prompt_encoder: dict[str, Any] | None = None,
        format: int = FORMAT,
    ):
        super().__init__()
        self.register_modules(
            auxiliary=auxiliary,
            flow=flow,
            sampler=sampler,
            vae=vae,
            clusters=clusters,
            weak_flow=weak_flow,
            weak_sampler=weak_sampler,
        )
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
        latent_steps: int | None = None,
        solver: str | None = None,
        latent_solver: str | None = None,
        class_labels: ClassLabels = None,
        cluster: Clustering = None,
        prompt: Prompt = None,
        guidance: float | None = None,
        latent_guidance: float | None = None,
        autoguidance: float | None = None,
        latent_autoguidance: float | None = None,
        temperature: float | None = None,
        seed: int = 0,
        first_image: int = 0,
        batch_size: int = 64,
        dtype: torch.dtype | None = None,
        output_type: OutputType = "pil",
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
            cluster: one cluster of z or several, which the images take in turn; None draws image i's by
                (seed, i), as often as the training images had it.
            prompt: one text or several, which the images take in turn, for a model that was trained with
                texts; image i then has a class and a cluster only where they are asked for. None, and a text
                without words, for no text.
            guidance: of the flow model by class, cluster and text; 1 for none, None for the best that
                training found, or 1. A network that has learned its guidance takes one evaluation, another
                takes two.
            latent_guidance: of the latent sampler, likewise.
            autoguidance: of the flow model, away from a worse one (arXiv 2406.02507); likewise.
            latent_autoguidance: of the latent sampler, likewise.
            temperature: of the source, x = mu + temperature * sigma * noise, 0 to 1.5; None for the model's
                own, or 1. Below 1 the images are cleaner and vary less.
            seed: of the request; image i depends on (seed, i) only.
            first_image: index i of the first image, to extend an earlier request.
            batch_size: images at a time.
            dtype: autocast to torch.bfloat16 or torch.float16; None computes as the weights are.
            output_type: "pil", or "pt" for a tensor (N, C, H, W) in [-1, 1], or "latent" for the codec's
                latents in its own units.

        Returns:
            A `PipelineOutput`; its nfe has the keys sampler, decoder and flow, and codec for decoded latents.
            A guided evaluation counts as two, with the class and without.

        Raises:
            UserError: unknown solver, class or cluster, a prompt for a model without texts, guidance that the
                model cannot have, steps, num_images or batch_size below 1, or no codec for the latents.
        """
        return self._join(
            self.stream(
                num_images,
                solver=solver,
                steps=steps,
                latent_solver=latent_solver,
                latent_steps=latent_steps,
                class_labels=class_labels,
                cluster=cluster,
                prompt=prompt,
                guidance=guidance,
                latent_guidance=latent_guidance,
                autoguidance=autoguidance,
                latent_autoguidance=latent_autoguidance,
                temperature=temperature,
                seed=seed,
                first_image=first_image,
                batch_size=batch_size,
                dtype=dtype,
                output_type=output_type,
            )
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
        solver, steps = ode.settle_solver(self.flow, solver, steps, 2)
        latent_solver, latent_steps = ode.settle_solver(self.sampler, latent_solver, latent_steps, 4)
        return {
            "solver": solver,
            "steps": steps,
            "latent_solver": latent_solver,
            "latent_steps": latent_steps,
        }

    def strengths(self):
        """Guidance of flow and latent sampler, and the temperature of P_L."""
        return {
            **super().strengths(),
            "latent_guidance": Strength(self.sampler, "guidance"),
            "latent_autoguidance": Strength(self.sampler, "autoguidance", self.weak_sampler, "weak-sampler"),
        }

    # The parts of the way from noise to image, each for itself

    def encode(self, y: Tensor) -> DiagonalGaussian:
        """Return q(z|y), (N, c, h, w), for images y (N, C, H, W) in [-1, 1], or normalised codec latents."""
        return self.auxiliary.encode(y)

    def sample_z(
        self,
        w: Tensor,
        labels: Conditions = NOTHING,
        *,
        steps: int | None = None,
        solver: str | None = None,
        guidance: float | None = None,
        autoguidance: float | None = None,
    ) -> ode.Solution:
        """Carry w ~ N(0, 1), (N, c, h, w), to z; the solution's `end` is z as `prior` takes it.

        Args:
            w: preimages of z.
            labels: classes, a row for each image (`labels_of`).
            steps: of the latent sampler; None for 4, or 1 with "mean".
            solver: None for "mean" where the sampler has an average velocity, else "midpoint".
            guidance: `latent_guidance` of `__call__`.
            autoguidance: `latent_autoguidance` of `__call__`.
        """
        solver, steps = ode.settle_solver(self.sampler, solver, steps, 4)
        settled = self.settle_strengths(
            labels=labels.labels, latent_guidance=guidance, latent_autoguidance=autoguidance
        )
        field = self.field(
            self.sampler,
            labels,
            settled["latent_guidance"],
            settled["latent_autoguidance"],
            self.weak_sampler,
            count=len(w),
        )
        solution = ode.integrate(field, w, steps=steps, solver=solver)
        return ode.Solution(self.auxiliary.unstandardize(solution.end), solution.nfe, None, solution.times)

    def invert_z(
        self, z: Tensor, labels: Conditions = NOTHING, *, steps: int = 16, solver: str = "midpoint"
    ) -> ode.Solution:
        """Carry z (N, c, h, w) back to w, the solution's `end`: the latent sampler's ODE in reverse.

        Args:
            z: as `prior` takes it.
            labels: classes, a row for each image.
            steps: of the solver.
            solver: any but "mean", which has no reverse.
        """
        field = self.field(self.sampler, labels)
        return ode.integrate(field, self.auxiliary.standardize(z), steps=steps, solver=solver, reverse=True)

    def of_cluster(self, labels: Conditions, z: Tensor) -> Conditions:
        """Return labels with the cluster of each z (N, c, h, w); as they are for a model without clusters."""
        if self.clusters is None:
            return labels
        return labels.also(cluster=self.clusters.assign(self.auxiliary.standardize(z)))

    def prior(self, z: Tensor) -> DiagonalGaussian:
        """Return the learned prior P_L (eq. 3), (N, C, H, W), for z (N, c, h, w)."""
        return self.auxiliary.decode(z)

    def source(self, z: Tensor, noise: Tensor, temperature: float | None = None) -> Tensor:
        """Return x = mu(z) + temperature * sigma(z) * noise, (N, C, H, W); eq. 3 at a temperature of 1.

        Args:
            z: as `prior` takes it.
            noise: standard normal, (N, C, H, W).
            temperature: None for the model's own, or 1.
        """
        return self.prior(z).at((self.temperature if temperature is None else temperature) * noise)

    def carry(
        self,
        x: Tensor,
        z: Tensor,
        labels: Conditions = NOTHING,
        *,
        steps: int | None = None,
        solver: str | None = None,
        guidance: float | None = None,
        autoguidance: float | None = None,
    ) -> ode.Solution:
        """Carry x ~ P_L (N, C, H, W) to the image, the solution's `end`, not clamped.

        Args:
            x: source samples.
            z: auxiliary latents that they were drawn at.
            labels: classes, a row for each image; nothing for the velocity without a class.
            steps: of the flow; None for 2, or 1 with "mean".
            solver: None for "mean" where the flow has an average velocity, else "midpoint".
            guidance: see `__call__`.
            autoguidance: see `__call__`.
        """
        solver, steps = ode.settle_solver(self.flow, solver, steps, 2)
        field = self.flow_field(labels.also(z=z), guidance, autoguidance)
        return ode.integrate(field, x, steps=steps, solver=solver)

    def _draw(self, indices, seed):
        w = self.noise(self.auxiliary.z_shape, indices, seed, "w")
        return w, self.noise(self.sample_shape, indices, seed, "x")

    def _make(
        self,
        noise,
        labels,
        *,
        steps,
        solver,
        latent_steps,
        latent_solver,
        guidance=None,
        latent_guidance=None,
        autoguidance=None,
        latent_autoguidance=None,
        temperature=1.0,
    ):
        """w -> z -> P_L -> x -> y."""
        w, noise_x = noise
        latent = self.sample_z(
            w,
            labels,
            steps=latent_steps,
            solver=latent_solver,
            guidance=latent_guidance,
            autoguidance=latent_autoguidance,
        )
        x = self.source(latent.end, noise_x, temperature)
        image = self.carry(
            x,
            latent.end,
            labels,
            steps=steps,
            solver=solver,
            guidance=guidance,
            autoguidance=autoguidance,
        )
        return image.end, {"sampler": latent.nfe, "decoder": 1, "flow": image.nfe}
