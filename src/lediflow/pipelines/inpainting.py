"""Pictures as a start instead of noise: `inpaint` (eq. 7) and `restyle` (SDEdit), for every pipeline."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from lediflow import ode
from lediflow.codecs import Codec, CodecSpace
from lediflow.conditions import Conditions
from lediflow.devices import to_device
from lediflow.errors import UserError
from lediflow.fields import inpainted
from lediflow.flow import phi
from lediflow.pictures import to_float, to_pil
from lediflow.pipelines.base import ImagePipeline
from lediflow.pipelines.codec import OutputType, PipelineOutput, mean_nfe
from lediflow.pipelines.labels import ClassLabels
from lediflow.pipelines.photos import (
    Picture,
    covered,
    feathered,
    filled,
    largest_region,
    mask_tensor,
    pasted,
    photo_tensor,
    region_around,
    resized,
)


class Inpainting(ImagePipeline):
    """Mixin of the pipelines: what starts at a picture and needs no latent z."""

    @abstractmethod
    def _source(
        self,
        y: Tensor,
        indices: Sequence[int],
        seed: int,
        labels: Conditions,
        *,
        strength: float = 0.0,
        constant_noise: bool = False,
        latent_begin: float = 1.0,
        latent_solver: str | None = None,
        latent_steps: int | None = None,
        region: Tensor | None = None,
        hide: bool = False,
    ) -> tuple[Tensor, Conditions, dict[str, float]]:
        """Draw where the flow starts for variants of a picture; the options are those of `inpaint`.

        Args:
            y: the picture as the flow makes it, (1, C, H, W).
            indices: of the variants.
            seed: of the request.
            labels: a row for each variant.
            strength: of the change of z.
            constant_noise: the noise of x is that of variant 0.
            latent_begin: time t at which the latent sampler starts, at phi_t of the picture's z; 1 for not.
            latent_solver: of the latent sampler.
            latent_steps: of the latent sampler.
            region: of the picture, bool (1, 1, H, W): z of that alone changes; None for all of it.
            hide: z of the region is made without the encoder.

        Returns:
            x (n, C, H, W), all that the flow is told, and the evaluations of each network.
        """

    def inpaint(
        self,
        image: Picture,
        mask_image: Picture,
        *,
        strength: float = 0.0,
        num_images: int = 1,
        padding_mask_crop: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        solver: str | None = None,
        latent_steps: int | None = None,
        latent_solver: str | None = None,
        batch_size: int = 64,
        dtype: torch.dtype | None = None,
        output_type: OutputType = "pil",
        masked_content: Literal["original", "fill"] = "original",
        feather: int = 0,
        constant_noise: bool = False,
        class_labels: ClassLabels = None,
    ) -> PipelineOutput:
        """Make what the mask shows anew, and leave everything else as it is, bit for bit (eq. 7).

        A photo may have any size: the model sees a region of its own aspect around the mask, and what it
        makes is brought to the photo's size and pasted back without a seam.

        Args:
            image: PIL image, uint8 array (H, W) or (H, W, C), or tensor (C, H, W) or (1, C, H, W) in [-1, 1].
            mask_image: of the same size; 1 or white is made anew, 0 or black stays, and what lies between is
                a blend of both. A PIL image, an array or a tensor; "alpha" stands for what is transparent in
                the image.
            strength: z of what the mask touches becomes that of sqrt(1 - s^2) w + s r, where s is the
                strength, w the noise that z came from and r standard normal. 0 keeps z, so only details
                change; 1 forgets what was there.
            num_images: how many variants; variant i depends on (seed, i) only.
            padding_mask_crop: pixels around the mask that the model sees at the least; None for as much of
                the photo as there is. Less shows the model more detail and less of the surroundings.
            seed: of the request.
            steps: of the flow; None as in the pipeline's call.
            solver: of the flow; None as in the pipeline's call.
            latent_steps: of the latent sampler, both ways; None for 8.
            latent_solver: of the latent sampler, both ways; None for "midpoint". "mean", which has no way
                back, goes back by 8 midpoint steps of the velocity.
            batch_size: variants at a time.
            dtype: autocast to torch.bfloat16 or torch.float16; None computes as the weights are.
            output_type: "pil", "pt" for a tensor (N, C, H, W) in [-1, 1] of the photo's size, or "latent"
                for the region in the codec's latents.
            masked_content: whether the encoder sees what is under the mask ("original", so that what is made
                resembles it) or not ("fill"; always so for "alpha"). Then a smooth continuation of the
                surroundings is there, and the latent sampler makes z for it, `latent_steps` steps twice.
            feather: pixels over which the mask's edge is softened, outside of it; what it then does not reach
                stays as it is.
            constant_noise: all variants share the noise of x ~ P_L, so that only z differs.
            class_labels: of the variants in turn, for a model with classes; None for no class.

        Returns:
            A `PipelineOutput` with the whole photos, in the model's channels.

        Raises:
            UserError: the mask is of another size or black everywhere, an image cannot be used, strength is
                outside [0, 1] or given to a model without a latent, or as the pipeline's call.
        """
        check_strength(strength)
        if masked_content not in ("original", "fill"):
            raise UserError(f"masked_content must be 'original' or 'fill', not {masked_content!r}")
        self.check_request(
            num_images, batch_size=batch_size, output_type=output_type, class_labels=class_labels
        )
        channels, *size = self.picture_shape()
        settled = self.settle(solver=solver, steps=steps)
        photo = photo_tensor(image, channels)
        mask = feathered(mask_tensor(mask_image, image, (photo.shape[1], photo.shape[2])), feather)
        region = region_around(mask, padding_mask_crop, (size[0], size[1]))
        pixels = resized(_as_float(region.cut(photo))[None], (size[0], size[1]))
        generate = covered(region.cut(mask)[None] > 0, (size[0], size[1]))
        hide = masked_content == "fill" or isinstance(mask_image, str)
        if hide:
            pixels = filled(pixels, generate)

        def make(y: Tensor, x: Tensor, told: Conditions) -> ode.Solution:
            cells = covered(generate, self.sample_shape[1:]).to(y.device).expand(len(x), -1, -1, -1)
            field = inpainted(self.flow_field(told), cells, y - x)
            solution = ode.integrate(field, x, steps=settled["steps"], solver=settled["solver"])
            end = torch.where(cells, solution.end, y)  # a sum of steps of y - x is y to rounding only
            return ode.Solution(end, solution.nfe, None, solution.times)

        made, nfe = self._variants(
            pixels, make, num_images, seed, batch_size, dtype, class_labels,
            strength=strength, constant_noise=constant_noise,
            latent_solver=latent_solver, latent_steps=latent_steps, region=generate, hide=hide,
        )  # fmt: skip
        made, nfe = self._shown(made, nfe, output_type)
        if output_type == "latent":
            return PipelineOutput(images=made, nfe=nfe)
        whole = pasted(_as_float(photo) if output_type == "pt" else photo, made, mask, region)
        return PipelineOutput(images=to_pil(_as_float(whole)) if output_type == "pil" else whole, nfe=nfe)

    def restyle(
        self,
        image: Picture,
        *,
        strength: float = 0.5,
        num_images: int = 1,
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
        """Make a sketch or a collage look like what the model was trained on (SDEdit, arXiv 2108.01073).

        The flow starts at phi_t = (1 - t) x + t y of the picture y with t = 1 - strength, instead of at x.
        Where there is a latent sampler it starts at phi_t of the picture's z in the same way, and x ~ P_L is
        drawn at the z where it ends: a sketch's own z lies where no training image does.

        Args:
            image: as in `inpaint`; its largest part of the model's aspect is used.
            strength: 0 leaves the picture as it is, 1 leaves nothing of it.
            num_images: how many variants; variant i depends on (seed, i) only.
            seed: of the request.
            steps: of the flow on the part of the way that is left; None as in the pipeline's call.
            solver: of the flow; None as in the pipeline's call.
            latent_steps: of the latent sampler, likewise.
            latent_solver: of the latent sampler; None as in the pipeline's call.
            batch_size: variants at a time.
            dtype: as in `inpaint`.
            output_type: as in `inpaint`; pictures have the model's size.
            class_labels: as in `inpaint`.

        Raises:
            UserError: as `inpaint`.
        """
        check_strength(strength)
        pixels = self._squares([image], num_images, batch_size, output_type, class_labels)
        settled = self.settle(
            solver=solver, steps=steps, latent_solver=latent_solver, latent_steps=latent_steps
        )
        t = 1 - strength
        latent = {name: value for name, value in settled.items() if name.startswith("latent_")}

        def make(y: Tensor, x: Tensor, told: Conditions) -> ode.Solution:
            times = torch.full((len(x),), t, device=x.device)
            if strength == 0:
                return ode.Solution(y.expand_as(x), 0, None, times[:1])
            start = phi(x, y.expand_as(x), times)
            field = self.flow_field(told)
            return ode.integrate(field, start, steps=settled["steps"], solver=settled["solver"], begin=t)

        made, nfe = self._variants(
            pixels, make, num_images, seed, batch_size, dtype, class_labels, latent_begin=t, **latent
        )
        return self._output(made, nfe, output_type)

    # From pictures to what the flow makes, and back

    def picture_shape(self) -> tuple[Any, int, int]:
        """Return (C, H, W) of the model's pictures; loads the codec where the flow makes its latents.

        Raises:
            UserError: no codec for the latents.
        """
        channels, height, width = self.sample_shape
        if self.config.codec_space is None:
            return channels, height, width
        if self.vae is None:
            self.load_codec()
        codec = Codec(self.vae)
        return codec.in_channels, height * codec.factor, width * codec.factor

    def _squares(
        self,
        images: Sequence[Picture],
        num_images: int,
        batch_size: int,
        output_type: str,
        class_labels: ClassLabels,
    ) -> Tensor:
        """Return the middles of pictures at the model's size, (N, C, H, W) in [-1, 1]; checks the request."""
        self.check_request(
            num_images, batch_size=batch_size, output_type=output_type, class_labels=class_labels
        )
        channels, *size = self.picture_shape()
        photos = [photo_tensor(image, channels) for image in images]
        regions = [largest_region((p.shape[1], p.shape[2]), (size[0], size[1])) for p in photos]
        parts = [_as_float(region.cut(photo))[None] for photo, region in zip(photos, regions, strict=True)]
        resampled = [resized(part, (size[0], size[1])) for part in parts]
        return torch.cat([torch.empty(0, channels, *size), *resampled])

    def _to_flow(self, pixels: Tensor) -> Tensor:
        """Bring pictures (N, C, H, W) to what the flow makes: themselves, or normalised latents."""
        pixels = to_device(pixels, self.device)
        if self.config.codec_space is None:
            return pixels
        return CodecSpace.from_dict(self.config.codec_space).normalize(Codec(self.vae).encode(pixels).mean)

    def _shown(
        self, made: Tensor, nfe: dict[str, float], output_type: str
    ) -> tuple[Tensor, dict[str, float]]:
        """Return pictures on the CPU, (N, C, H, W) in [-1, 1], or the codec's latents for "latent"."""
        out = self._finish(made.float(), nfe, "latent" if output_type == "latent" else "pt")
        images: Any = out.images
        return images.cpu(), out.nfe

    def _output(self, made: Tensor, nfe: dict[str, float], output_type: str) -> PipelineOutput:
        images, nfe = self._shown(made, nfe, output_type)
        return PipelineOutput(images=to_pil(images) if output_type == "pil" else images, nfe=nfe)

    def _told_labels(self, indices: Sequence[int], class_labels: ClassLabels) -> Conditions:
        """Return the classes of pictures; a picture's own class is not known unless it is given."""
        return Conditions() if class_labels is None else self.labels_of(indices, class_labels)

    @contextmanager
    def _computing(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Without gradients, and in the precision that was asked for."""
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            yield

    def _variants(
        self,
        pixels: Tensor,
        make: Callable[[Tensor, Tensor, Conditions], ode.Solution],
        num_images: int,
        seed: int,
        batch_size: int,
        dtype: torch.dtype | None,
        class_labels: ClassLabels,
        **options: Any,
    ) -> tuple[Tensor, dict[str, float]]:
        """Let `make(y, x, conditions)` make the variants of a picture (1, C, H, W), batch by batch."""
        made: list[Tensor] = []
        counts: list[tuple[int, dict[str, float]]] = []
        for start in range(0, num_images, batch_size):
            indices = range(start, min(start + batch_size, num_images))
            with self._computing(dtype):
                y = self._to_flow(pixels)
                labels = self._told_labels(indices, class_labels)
                x, told, nfe = self._source(y, indices, seed, labels, **options)
                solution = make(y, x, told)
            made.append(solution.end)
            counts.append((len(indices), {**nfe, "flow": solution.nfe}))
        return torch.cat(made), mean_nfe(counts)


def check_strength(strength: float) -> None:
    """Refuse a strength outside [0, 1].

    Raises:
        UserError: it is.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"strength must be from 0 to 1, not {strength:g}")


def _as_float(pixels: Tensor) -> Tensor:
    return pixels if pixels.is_floating_point() else to_float(pixels)
