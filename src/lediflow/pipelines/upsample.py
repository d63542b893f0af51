"""FlowUpsamplePipeline: a low-resolution image or latent -> a high-resolution one (arXiv 2312.07360)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from torch import Tensor
from torch.nn import functional

from lediflow import ode
from lediflow.conditions import Conditions
from lediflow.errors import UserError
from lediflow.fields import Field, conditional
from lediflow.gaussian import DiagonalGaussian
from lediflow.networks import unet, upsampling_prior, velocity  # noqa: F401  diffusers loads what is imported
from lediflow.networks.model import Network
from lediflow.pictures import to_pil
from lediflow.pipelines.codec import FORMAT, CodecPipeline, OutputType, PipelineOutput
from lediflow.pipelines.recognise import Given, InputType, recognise
from lediflow.pipelines.tiled_codec import TiledCodec
from lediflow.pipelines.upsample_request import (
    Seeds,
    UpsampleRequest,
    batches_of,
    check_noise_level,
    memory_explained,
    noise_of,
    passes_of,
    seeds_of,
    tiling_of,
)
from lediflow.tiles import Window, blended, tiled
from lediflow.upsampling import enlarged, noised

ENLARGE = ("nearest", "bilinear", "pixels")
STEPS = 10  # of Euler, where the paper's quality levels off (Table 4)
STEPS_FROM_A_PRIOR = 1  # more did not pay (docs/upsampling.md)


class FlowUpsamplePipeline(CodecPipeline):
    """Flow matching from an enlarged low-resolution sample to a high-resolution one.

    Args:
        flow: velocity network, told the enlarged sample (condition `image`) and, where it has that condition,
            the `noise_level`.
        vae: codec of the latents; None loads it when it is needed. One whose latents are others is refused.
        prior: network from the enlarged sample to mu and sigma, at which the flow starts; None to start at
            the enlarged sample itself, with noise.
        codec_space: a `CodecSpace` as a dict; None for a flow of pixels.
        scale: how many times larger a side becomes.
        noise_level: of the start, from 0 to 999, by default; 999 is noise alone. With a prior it is 0.
        enlarge: how the sample is enlarged: "nearest" or "bilinear" what the flow works on, or "pixels"
            through the codec: decode, resize, encode to the mode.
        format: of the saved pipeline, which is always the one that this version writes.

    Raises:
        UserError: the codec's latents are not those that the flow was trained on, or an impossible setting.
    """

    _optional_components = ["vae", "prior"]  # noqa: RUF012  what diffusers reads

    def __init__(
        self,
        flow: Network,
        vae: AutoencoderKL | AutoencoderTiny | VQModel | None = None,
        prior: Network | None = None,
        codec_space: dict[str, Any] | None = None,
        scale: int = 4,
        noise_level: int = 200,
        enlarge: str = "nearest",
        format: int = FORMAT,
    ):
        super().__init__()
        if enlarge not in ENLARGE:
            raise UserError(f"enlarge must be one of {', '.join(ENLARGE)}, not {enlarge!r}")
        if scale < 2:
            raise UserError(f"scale must be at least 2, not {scale}")
        check_noise_level(noise_level)
        self.register_modules(flow=flow, vae=None, prior=prior)
        self.register_to_config(
            codec_space=codec_space, scale=scale, noise_level=noise_level, enlarge=enlarge, format=FORMAT
        )
        if vae is not None:
            self.use_codec(vae)

    def use_codec(self, vae: Any) -> None:
        """Decode and encode with this autoencoder, such as the `vae` of a base pipeline.

        Raises:
            UserError: its latents are not those that the flow was trained on, or the flow makes pixels.
        """
        if self.space is None:
            raise UserError("this model makes pixels; it has no codec")
        if vae is not self.vae:
            self.space.check(vae)
            self.register_modules(vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        num_inference_steps: int | None = None,
        *,
        solver: str | None = None,
        scale: int | None = None,
        noise_level: float | None = None,
        seed: int = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        first_image: int = 0,
        tile_size: int | None = None,
        overlap: int | None = None,
        input_type: InputType = "auto",
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 4,
        dtype: torch.dtype | None = None,
        output_type: OutputType = "pil",
    ) -> PipelineOutput:
        """Enlarge images.

        Args:
            image: a PIL image or a list of them, of any sizes; pixels (B, C, h, w), float in [-1, 1] or
                uint8; or, for a model of latents, those that a base pipeline returned with
                output_type="latent", also packed as Flux does.
            num_inference_steps: solver steps; None for 10, or 1 with "mean" or from a learned prior.
            solver: one of `ode.SOLVERS`; None for "mean" where the flow has an average velocity, otherwise
                "euler".
            scale: how many times larger; None for the model's own. A power of that runs the model several
                times, one upon the other.
            noise_level: of the start, 0 to 999; None for the model's own.
            seed: image i depends on (seed, i) only.
            generator: instead of `seed`; one for all images, or one for each.
            first_image: index i of the first image, to extend an earlier request.
            tile_size: side of the tiles, in pixels of the result, that a larger image is made of, in the flow
                and in the codec; memory is then that of one tile. None for the whole image at once.
            overlap: of the tiles, in pixels; None for a quarter of a tile.
            input_type: "pixels" or "latent" where the channels of a tensor do not tell.
            height: with `width` the size that packed latents stand for, in pixels; None for a square.
            width: see `height`.
            batch_size: images of one size at a time; with tiles always one.
            dtype: autocast to torch.bfloat16 or torch.float16; None computes as the weights are.
            output_type: "pil", or "pt" for a tensor (N, C, H, W) in [-1, 1], or "latent" for the codec's
                latents in its own units.

        Returns:
            A `PipelineOutput`; its nfe has the key flow, and prior, encoder and codec where they were used;
            each tile counts.

        Raises:
            UserError: input of another kind, a size or scale that the model cannot make, another codec, or
                too little memory; it says what to do.
        """
        request = self.settled(num_inference_steps, solver, scale, noise_level, tile_size, overlap)
        given = self._given(image, input_type, height, width, batch_size, output_type)
        seeds = seeds_of(len(given.images), seed, generator, first_image)
        batches = batches_of([one.shape for one in given.images], 1 if request.tile else batch_size)
        outputs = []
        with self._shown(given, batches, request):
            for batch in batches:
                low = torch.cat([given.images[i] for i in batch]).to(self.flow.device)
                times = self.config.scale**request.passes * (self._factor if given.latent else 1)
                with memory_explained((low.shape[2] * times, low.shape[3] * times), tile_size):
                    images, nfe = self._enlarge(
                        low, given.latent, [seeds[i] for i in batch], request, dtype, output_type
                    )
                made: Any = to_pil(images) if output_type == "pil" else images
                outputs.append(PipelineOutput(images=made, nfe=nfe))
        return self._join(iter(outputs))

    def settle(self, *, solver: str | None = None, steps: int | None = None) -> dict[str, Any]:
        """Return "solver" and "steps" of a request, with what None stands for.

        Raises:
            UserError: unknown solver, steps below 1, or "mean" for a network without average velocity.
        """
        if solver is None and not self.flow.average_velocity:
            solver = "euler"
        usual = STEPS if self.prior is None else STEPS_FROM_A_PRIOR
        solver, steps = ode.settle_solver(self.flow, solver, steps, usual)
        return {"solver": solver, "steps": steps}

    def settled(
        self,
        num_inference_steps: int | None = None,
        solver: str | None = None,
        scale: int | None = None,
        noise_level: float | None = None,
        tile_size: int | None = None,
        overlap: int | None = None,
    ) -> UpsampleRequest:
        """Return what the settings of a call stand for.

        Raises:
            UserError: they cannot work, whatever the image; see `__call__`.
        """
        tile, overlap = tiling_of(tile_size, overlap, self._factor, self._unit)
        if self.prior is not None and noise_level:
            raise UserError("this model starts at a learned prior, which has no noise_level; leave it out")
        level = 0 if self.prior is not None else self.config.noise_level
        return UpsampleRequest(
            **self.settle(solver=solver, steps=num_inference_steps),
            passes=passes_of(self.config.scale if scale is None else scale, self.config.scale),
            noise_level=check_noise_level(level if noise_level is None else noise_level),
            tile=tile,
            overlap=overlap,
            unit=self._unit,
        )

    def need_codec(self) -> None:
        """Load the codec where there is one to be loaded.

        Raises:
            UserError: see `load_codec`.
        """
        if self.space is not None and self.vae is None:
            self.load_codec()

    # The parts of the way

    def start(self, image: Tensor, noise: Tensor, level: Tensor, tiles: Sequence[Window]) -> Tensor:
        """Return x, where the flow starts: `image` with noise, or mu + sigma * noise of the prior.

        Args:
            image: enlarged sample, (B, C, H, W).
            noise: standard normal, shape of image.
            level: of the noise, (B,), from 0 to 999.
            tiles: that cover the image, in which the prior is evaluated.
        """
        if self.prior is None:
            return noised(image, level, noise)
        priors = (self.prior(tile.of(image)) for tile in tiles)
        both = (torch.cat((prior.mean, prior.log_var), 1) for prior in priors)
        mean, log_var = blended(both, tiles, image.shape[2:]).chunk(2, 1)
        return DiagonalGaussian(mean, log_var).at(noise)

    def carry(
        self, x: Tensor, image: Tensor, level: Tensor, tiles: Sequence[Window], *, solver: str, steps: int
    ) -> ode.Solution:
        """Carry x to the high-resolution sample, the solution's `end`; arguments as in `start`."""
        known = self.flow.config.get("conditions") or {}

        def field_of(tile: Window) -> Field:
            told = {"image": tile.of(image), "noise_level": level}
            return conditional(self.flow, Conditions(**{name: told[name] for name in told if name in known}))

        return ode.integrate(tiled(field_of, tiles), x, solver=solver, steps=steps)

    def _enlarge(
        self,
        low: Tensor,
        latent: bool,
        seeds: Seeds,
        request: UpsampleRequest,
        dtype: torch.dtype | None,
        output_type: OutputType,
    ) -> tuple[Tensor, dict[str, float]]:
        """Enlarge images of one size, pass upon pass, and count the evaluations of each network."""
        nfe: Counter[Any] = Counter()
        codec = None if self.space is None else TiledCodec(self.vae, self.space, request, nfe)
        pixels = None if latent else self._padded(low)
        if pixels is None:
            made = self._normalized(low)
        else:
            made = pixels if codec is None or self.config.enlarge == "pixels" else codec.encode(pixels)
        for turn in range(request.passes):
            image = self._enlarged(made, pixels, codec)
            noise = noise_of(image.shape[1:], seeds, turn, image.device)
            level = torch.full((len(image),), float(request.noise_level), device=image.device)
            tiles = request.windows(image.shape[2:])
            with torch.autocast(image.device.type, dtype=dtype, enabled=dtype is not None):
                x = self.start(image, noise, level, tiles).float()
                solution = self.carry(x, image, level, tiles, solver=request.solver, steps=request.steps)
            nfe.update({"flow": solution.nfe} | ({} if self.prior is None else {"prior": len(tiles)}))
            made, pixels = solution.end, None
        if codec is None:
            images = made.clamp(-1, 1)
        elif output_type == "latent":
            images = codec.space.denormalize(made)
        else:
            images = codec.decode(made)
        if latent:
            return images, dict(nfe)
        # what was padded below and to the right falls off
        part = self._factor if output_type == "latent" else 1
        times = self.config.scale**request.passes
        h, w = (-(-side * times // part) for side in low.shape[2:])
        return images[..., :h, :w], dict(nfe)

    def _enlarged(self, made: Tensor, pixels: Tensor | None, codec: TiledCodec | None) -> Tensor:
        """Return a sample enlarged for the next pass; `pixels` are those that it is of, where it has some."""
        scale, how = self.config.scale, self.config.enlarge
        if codec is None:
            return _times(made.clamp(-1, 1), scale, "bilinear" if how == "pixels" else how)
        if how != "pixels":
            return _times(made, scale, how)
        return codec.encode(_times(codec.decode(made) if pixels is None else pixels, scale, "bilinear"))

    def _normalized(self, latents: Tensor) -> Tensor:
        assert self.space is not None, "latents are given to a model of latents only"
        (h, w), unit = latents.shape[2:], self._low_unit
        if h % unit or w % unit:
            raise UserError(
                f"latents of {h}x{w} cannot be enlarged {self.config.scale} times by this model: their sides "
                f"must be multiples of {unit}"
            )
        return self.space.normalize(latents)

    # Sizes

    @property
    def image_channels(self) -> int:
        """Channels of the images that are taken: 1 or 3."""
        if self.space is None:
            return self.flow.config.in_channels
        return 3 if self.vae is None else self.vae.config.in_channels

    @property
    def _factor(self) -> int:
        """Pixels of a side that are one number of what the flow works on."""
        return 1 if self.space is None else self.space.factor

    @property
    def _unit(self) -> int:
        """What sides of the flow's samples must be multiples of: its patches, merged level by level."""
        config = self.flow.config
        levels = config.get("widths") or config.get("multipliers") or (1,)
        of_prior = 1 if self.prior is None else self.prior.config.get("scale", 1)
        return math.lcm(config.get("patch_size", 1) * 2 ** (len(levels) - 1), of_prior)

    @property
    def _low_unit(self) -> int:
        """What sides must be multiples of before they are enlarged."""
        return self._unit // math.gcd(self._unit, self.config.scale)

    def _padded(self, pixels: Tensor) -> Tensor:
        """Return images whose sides codec and flow can take, the last row and column repeated."""
        unit = self._low_unit * self._factor
        below, right = (-side % unit for side in pixels.shape[2:])
        return functional.pad(pixels, (0, right, 0, below), mode="replicate") if below or right else pixels

    def _given(
        self,
        image: Any,
        input_type: InputType,
        height: int | None,
        width: int | None,
        batch_size: int,
        output_type: str,
    ) -> Given:
        """Return what is to be enlarged, after all that can be refused before any work."""
        known = ("pil", "pt") if self.space is None else ("pil", "pt", "latent")
        if output_type not in known:
            raise UserError(f"output_type must be {' or '.join(map(repr, known))}, not {output_type!r}")
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        if output_type != "latent" or self.config.enlarge == "pixels" or not isinstance(image, Tensor):
            self.need_codec()
        given = recognise(
            image, self.image_channels, self.space, input_type=input_type, height=height, width=width
        )
        if not given.latent:
            self.need_codec()
        if output_type != "pil" and len({one.shape for one in given.images}) > 1:
            raise UserError(
                "images of several sizes make no one tensor; take output_type='pil', or one size a call"
            )
        return given

    @contextmanager
    def _shown(self, given: Given, batches: list[list[int]], request: UpsampleRequest) -> Iterator[None]:
        """Show how far a request is: a bar over the evaluations of the flow."""
        per_step = ode.EVALUATIONS_PER_STEP[request.solver]
        total: float = math.inf  # dopri5 chooses its steps
        if per_step is not None:
            total = per_step * request.steps * sum(self._tiles(given, batch[0], request) for batch in batches)
        with self.progress_bar(total=total) as bar:
            hook = self.flow.register_forward_hook(lambda *_: bar.update() and None)
            try:
                yield
            finally:
                hook.remove()

    def _tiles(self, given: Given, index: int, request: UpsampleRequest) -> int:
        """Return how many tiles an image has in all passes."""
        low = given.images[index]
        h, w = low.shape[2:] if given.latent else (s // self._factor for s in self._padded(low).shape[2:])
        sides = [self.config.scale ** (turn + 1) for turn in range(request.passes)]
        return sum(len(request.windows((h * times, w * times))) for times in sides)


def _times(small: Tensor, scale: int, how: Any) -> Tensor:
    return enlarged(small, (small.shape[2] * scale, small.shape[3] * scale), how)
