"""Editing with the latent z (section 4.2 of LeDiFlow): reconstruct, invert, interpolate, vary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from lediflow import ode
from lediflow.conditions import Conditions
from lediflow.errors import UserError, nearest
from lediflow.pipelines.codec import OutputType, PipelineOutput, mean_nfe
from lediflow.pipelines.inpainting import check_strength
from lediflow.pipelines.labels import ClassLabels
from lediflow.pipelines.latent_start import LatentStart, latent_solvers, used
from lediflow.pipelines.photos import Picture
from lediflow.sources import Path, between

Space = Literal["noise", "latent"]


@dataclass
class ReconstructOutput(PipelineOutput):
    """What `Editing.reconstruct` returns: `images` is what the flow made of a sample of the prior.

    Attributes:
        prior_mean: mu(z), like `images`.
        prior_sample: x ~ P_L, what the flow started at, like `images`.
    """

    prior_mean: list[Image.Image] | Tensor = field(default_factory=list)
    prior_sample: list[Image.Image] | Tensor = field(default_factory=list)


@dataclass(frozen=True)
class Inversion:
    """Where pictures come from; `carry(x, z)` leads back to them, and `sample_z(w)` to z.

    Attributes:
        z: mean of q(z|y), (N, c, h, w).
        w: noise that the latent sampler makes z of, shape of z.
        x: point of the source that the flow at z carries to the picture, (N, C, H, W).
        noise: (x - mu) / sigma, standard normal where the model is right, shape of x.
        nfe: evaluations of each network for one picture.
    """

    z: Tensor
    w: Tensor
    x: Tensor
    noise: Tensor
    nfe: dict[str, float]


class Editing(LatentStart):
    """Mixin of LeDiFlowPipeline: what is done to a picture through its latent z and the noise w of that.

    The latent sampler goes from z to w and back with one solver, by default 8 midpoint steps, also where the
    model has an average velocity: that has no way back (no u is learned for r < t), so there the velocity
    itself is integrated (r = t), and a picture that is not changed stays what it was.
    """

    def reconstruct(
        self,
        image: Picture | Sequence[Picture],
        *,
        seed: int = 0,
        steps: int | None = None,
        solver: str | None = None,
        batch_size: int = 64,
        dtype: torch.dtype | None = None,
        output_type: OutputType = "pil",
        class_labels: ClassLabels = None,
    ) -> ReconstructOutput:
        """Encode pictures and make them again: y -> z -> P_L -> x -> y.

        Args:
            image: one picture or a list of them, as for `inpaint`; the largest part in the middle of each
                that has the model's aspect is used.
            seed: of the noise of x ~ P_L; that of picture i depends on (seed, i) only.
            steps: of the flow; None as in the pipeline's call.
            solver: of the flow; None as in the pipeline's call.
            batch_size: pictures at a time.
            dtype: as in `inpaint`.
            output_type: as in `inpaint`.
            class_labels: of the pictures in turn, for a model with classes; None for no class.

        Raises:
            UserError: a picture cannot be used, or as the pipeline's call.
        """
        images = list(image) if isinstance(image, Sequence) else [image]
        pixels = self._squares(images, len(images), batch_size, output_type, class_labels)
        settled = self.settle(solver=solver, steps=steps)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        counts: list[tuple[int, dict[str, float]]] = []
        for start in range(0, len(images), batch_size):
            indices = range(start, min(start + batch_size, len(images)))
            with self._computing(dtype):
                labels = self._told_labels(indices, class_labels)
                z = self.encode(self._to_flow(pixels[indices.start : indices.stop])).mean
                prior = self.prior(z)
                x = prior.at(self.temperature * self.noise(self.sample_shape, indices, seed, "x"))
                labels = self.of_cluster(labels, z)
                end = self.carry(x, z, labels, solver=settled["solver"], steps=settled["steps"])
            parts.append((end.end, prior.mean, x))
            counts.append((len(indices), {"encoder": 1, "decoder": 1, "flow": end.nfe}))
        end, mean, sample = (
            self._output(torch.cat(part), mean_nfe(counts), output_type) for part in zip(*parts, strict=True)
        )
        return ReconstructOutput(
            images=end.images, nfe=end.nfe, prior_mean=mean.images, prior_sample=sample.images
        )

    def invert(
        self,
        image: Picture | Sequence[Picture],
        *,
        steps: int = 16,
        solver: str = "midpoint",
        latent_steps: int = 16,
        latent_solver: str = "midpoint",
        dtype: torch.dtype | None = None,
        class_labels: ClassLabels = None,
    ) -> Inversion:
        """Find the z of pictures, the noise w that z comes from, and the x that they come from.

        w and x by the reverse ODE of latent sampler and flow. "dopri5" is exact to its tolerance (1e-5), the
        error of the others falls with their steps. "mean" has no reverse and is refused: the default goes
        along the velocity itself (r = t), also in models refined to one evaluation.

        Args:
            image: one picture or a list of them, as for `reconstruct`.
            steps: of the flow.
            solver: of the flow, any but "mean".
            latent_steps: of the latent sampler.
            latent_solver: of the latent sampler, any but "mean".
            dtype: as in `inpaint`.
            class_labels: as in `reconstruct`.

        Raises:
            UserError: a picture cannot be used, or the solver is unknown or "mean".
        """
        images = list(image) if isinstance(image, Sequence) else [image]
        pixels = self._squares(images, len(images), len(images), "pt", class_labels)
        with self._computing(dtype):
            y = self._to_flow(pixels)
            labels = self._told_labels(range(len(images)), class_labels)
            z = self.encode(y).mean
            w = self.invert_z(z, labels, steps=latent_steps, solver=latent_solver)
            prior = self.prior(z)
            flow = self.flow_field(labels.also(z=z))
            x = ode.integrate(flow, y, steps=steps, solver=solver, reverse=True)
        nfe = {"encoder": 1, "sampler": w.nfe, "decoder": 1, "flow": x.nfe}
        return Inversion(z, w.end, x.end, (x.end - prior.mean) / prior.std, nfe)

    def interpolate(
        self,
        *ends: Picture | int,
        num_images: int = 8,
        space: Space = "noise",
        path: Path = "slerp",
        loop: bool = False,
        seed: int = 0,
        steps: int | None = None,
        solver: str | None = None,
        latent_steps: int | None = None,
        latent_solver: str | None = None,
        batch_size: int = 64,
        dtype: torch.dtype | None = None,
        output_type: OutputType = "pil",
        class_labels: ClassLabels = None,
    ) -> PipelineOutput:
        """Go from one picture to the next, with the noise of x ~ P_L constant (figure 5).

        Args:
            ends: two or more pictures, as for `reconstruct`, or seeds: whole numbers, of which each stands
                for the first image of that request.
            num_images: from each end to the next, both included; an end that two legs share comes once.
            space: "noise" goes between the noise w of the ends, "latent" between their z. The paper argues
                that a way through z may cross regions where no data lie.
            path: "slerp" along the arc between both, which keeps the length that noise has, or "linear" as
                in the paper. In "latent" of z in units of its standard deviation.
            loop: also go from the last end to the first, without coming to that again.
            seed: of the noise of x.
            steps: of the flow; None as in the pipeline's call.
            solver: of the flow; None as in the pipeline's call.
            latent_steps: as in `inpaint`.
            latent_solver: as in `inpaint`.
            batch_size: images at a time.
            dtype: as in `inpaint`.
            output_type: as in `inpaint`.
            class_labels: one class, for a model with classes; None for no class.

        Returns:
            A `PipelineOutput` with (number of legs) * (num_images - 1) images, and one more without `loop`.
            What it takes to invert the ends is not in its nfe.

        Raises:
            UserError: fewer than two ends or images, an unknown space or path, or as `reconstruct`.
        """
        _check_choice("space", space, get_args(Space))
        _check_choice("path", path, get_args(Path))
        if len(ends) < 2:
            raise UserError(f"an interpolation goes between two or more images or seeds, not {len(ends)}")
        if num_images < 2:
            raise UserError(f"num_images must be at least 2, both ends, not {num_images}")
        pictures = [end for end in ends if not isinstance(end, int)]
        pixels = self._squares(pictures, num_images, batch_size, output_type, class_labels)
        settled = self.settle(solver=solver, steps=steps)
        back, forth = latent_solvers(latent_solver, latent_steps)

        def labels_of(count: int) -> Conditions:
            return self._told_labels([0] * count, class_labels)

        with self._computing(dtype):
            points, nfe = self._ends(ends, pixels, space, labels_of, back, forth)
        legs = len(ends) if loop else len(ends) - 1
        places = [(leg, i / (num_images - 1)) for leg in range(legs) for i in range(num_images - 1)]
        places += [] if loop else [(legs - 1, 1.0)]
        made: list[Tensor] = []
        counts: list[tuple[int, dict[str, float]]] = []
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            way = [between(points[leg], points[(leg + 1) % len(ends)], at, path) for leg, at in part]
            with self._computing(dtype):
                labels = labels_of(len(part))
                w = torch.stack(way)
                latent = ode.Solution(self.auxiliary.unstandardize(w), 0, None, w)
                if space == "noise":
                    latent = self.sample_z(w, labels, **forth)
                x = self.source(latent.end, self.noise(self.sample_shape, [0] * len(part), seed, "x"))
                end = self.carry(x, latent.end, labels, solver=settled["solver"], steps=settled["steps"])
            made.append(end.end)
            counts.append((len(part), {**used("sampler", latent.nfe), "decoder": 1, "flow": end.nfe}))
        return self._output(torch.cat(made), {**nfe, **mean_nfe(counts)}, output_type)

    def vary(
        self,
        image: Picture,
        strength: float = 0.5,
        *,
        num_images: int = 4,
        mask_image: Picture | None = None,
        seed: int = 0,
        constant_noise: bool = False,
        steps: int | None = None,
        solver: str | None = None,
        latent_steps: int | None = None,
        latent_solver: str | None = None,
        batch_size: int = 64,
        dtype: torch.dtype | None = None,
        output_type: OutputType = "pil",
        class_labels: ClassLabels = None,
    ) -> PipelineOutput:
        """Make variants of a picture: z -> w, moved, -> z', and an image from there (figure 6).

        Args:
            image: as for `inpaint`; the largest part in the middle that has the model's aspect is used.
            strength: s in sqrt(1 - s^2) w + s r, with r standard normal. The paper has w + alpha * r, of a
                variance above 1; its alpha of 0.5 is about 0.45 here. 1 forgets z, but for its
                cluster where the model has clusters, and 0 keeps it, so that only the noise of x ~ P_L makes
                a difference (figure 6 on the right); with `constant_noise` only z does (on the left).
            num_images: how many variants; variant i depends on (seed, i) only.
            mask_image: where the picture may change, as for `inpaint`, which then makes the variants: the
                rest stays, and the picture keeps its size.
            seed: of the request.
            constant_noise: all variants share the noise of x ~ P_L.
            steps: of the flow; None as in the pipeline's call.
            solver: of the flow; None as in the pipeline's call.
            latent_steps: as in `inpaint`.
            latent_solver: as in `inpaint`.
            batch_size: variants at a time.
            dtype: as in `inpaint`.
            output_type: as in `inpaint`.
            class_labels: as in `inpaint`.

        Raises:
            UserError: as `inpaint`.
        """
        options: dict[str, Any] = {
            "strength": strength,
            "constant_noise": constant_noise,
            "latent_solver": latent_solver,
            "latent_steps": latent_steps,
        }
        if mask_image is not None:
            return self.inpaint(
                image, mask_image, num_images=num_images, seed=seed, steps=steps, solver=solver,
                batch_size=batch_size, dtype=dtype, output_type=output_type, class_labels=class_labels,
                **options,
            )  # fmt: skip
        check_strength(strength)
        pixels = self._squares([image], num_images, batch_size, output_type, class_labels)
        settled = self.settle(solver=solver, steps=steps)

        def make(_y: Tensor, x: Tensor, told: Conditions) -> ode.Solution:
            flow = self.flow_field(told)
            return ode.integrate(flow, x, steps=settled["steps"], solver=settled["solver"])

        made, nfe = self._variants(pixels, make, num_images, seed, batch_size, dtype, class_labels, **options)
        return self._output(made, nfe, output_type)

    def _ends(
        self,
        ends: Sequence[Picture | int],
        pixels: Tensor,
        space: Space,
        labels_of: Callable[[int], Conditions],
        back: dict[str, Any],
        forth: dict[str, Any],
    ) -> tuple[list[Tensor], dict[str, float]]:
        """Return each end in the space to go through, (c, h, w): w, or standardised z; and evaluations."""
        nfe: dict[str, float] = {}
        encoded: Iterator[Tensor] = iter(())
        if len(pixels):
            z = self.encode(self._to_flow(pixels)).mean
            nfe["encoder"] = 1
            if space == "noise":
                encoded = iter(self.invert_z(z, labels_of(len(z)), **back).end)
            else:
                encoded = iter(self.auxiliary.standardize(z))
        points: list[Tensor] = []
        for end in ends:
            if not isinstance(end, int):
                points.append(next(encoded))
                continue
            w = self.noise(self.auxiliary.z_shape, [0], end, "w")
            if space == "latent":
                w = self.auxiliary.standardize(self.sample_z(w, labels_of(1), **forth).end)
            points.append(w[0])
        return points, nfe


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"unknown {name} {value!r}{nearest(value, known)}; choose from {', '.join(known)}")
