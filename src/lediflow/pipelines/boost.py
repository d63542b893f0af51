"""An upsampler behind any diffusers pipeline: the base makes a small latent, the flow a large one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from lediflow.codecs import Codec
from lediflow.errors import UserError
from lediflow.networks.hourglass import pair
from lediflow.pipelines.codec import OutputType, PipelineOutput
from lediflow.pipelines.upsample import FlowUpsamplePipeline


def boost(
    pipe: Any,
    upsampler: FlowUpsamplePipeline,
    prompt: str | Sequence[str] | None = None,
    *,
    num_inference_steps: int | None = None,
    flow_steps: int | None = None,
    solver: str | None = None,
    scale: int | None = None,
    noise_level: float | None = None,
    tile_size: int | None = None,
    overlap: int | None = None,
    seed: int = 0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    scale_attention: bool = False,
    output_type: OutputType = "pil",
    **base: Any,
) -> PipelineOutput:
    """Let a diffusers pipeline make small images and enlarge them before they are decoded.

    An upsampler of latents gets the base's latents and decodes with the base's codec; one of pixels gets its
    images. The upsampler's networks are moved to the device of what it gets.

    Args:
        pipe: a pipeline of diffusers with output_type="latent" (SD, SDXL, SD3, Flux, with LCM or without), or
            an `LDMPipeline`; for an upsampler of pixels any that makes images.
        upsampler: trained on the latents of the base's codec.
        prompt: for the base; None for one that takes none.
        num_inference_steps: of the base; None for its own default.
        flow_steps: solver steps of the upsampler, and what follows likewise: see `FlowUpsamplePipeline`.
        solver: of the upsampler.
        scale: likewise.
        noise_level: likewise.
        tile_size: likewise.
        overlap: likewise.
        seed: of base and upsampler.
        generator: instead of `seed`; one, or one for each image.
        scale_attention: correct the base's self-attention for an image size that it was not trained for
            (`scaled_attention`).
        output_type: as for `FlowUpsamplePipeline`.
        base: further arguments of the base, such as height, width, guidance_scale.

    Returns:
        What the upsampler returns.

    Raises:
        UserError: the base has no codec, or another one than the upsampler was trained for.
    """
    if generator is None:
        generator = torch.Generator("cpu").manual_seed(seed)
    told = {"prompt": prompt, "num_inference_steps": num_inference_steps}
    base = {**base, **{name: value for name, value in told.items() if value is not None}}
    size = {name: base.get(name) for name in ("height", "width")}
    with scaled_attention(pipe, **size, on=scale_attention):
        if upsampler.space is None:
            small, size = pipe(**base, generator=generator, output_type="pil").images, {}
        else:
            upsampler.use_codec(codec_of(pipe))
            small = base_latents(pipe, **base, generator=generator)
            for network in (upsampler.flow, upsampler.prior):
                if network is not None:
                    network.to(small.device)
    return upsampler(
        small,
        flow_steps,
        solver=solver,
        scale=scale,
        noise_level=noise_level,
        tile_size=tile_size,
        overlap=overlap,
        generator=generator,
        input_type="auto" if upsampler.space is None else "latent",
        output_type=output_type,
        **size,
    )


def codec_of(pipe: Any) -> Any:
    """Return the autoencoder of a diffusers pipeline.

    Raises:
        UserError: it has none.
    """
    for name in ("vae", "vqvae"):
        if pipe.components.get(name) is not None:
            return pipe.components[name]
    raise UserError(
        f"{type(pipe).__name__} has no autoencoder, so it makes no latents; take an upsampler of pixels"
    )


def base_latents(pipe: Any, **arguments: Any) -> Tensor:
    """Return the latents that a diffusers pipeline makes, in its codec's units and layout.

    Raises:
        UserError: the pipeline does not give them.
    """
    if "vqvae" in pipe.components:
        return _before_decoding(pipe, **arguments)
    if "output_type" not in inspect.signature(pipe.__call__).parameters:
        raise UserError(f"{type(pipe).__name__} has no output_type, so it does not give its latents")
    latents = pipe(**arguments, output_type="latent").images
    if not isinstance(latents, Tensor):
        raise UserError(f"{type(pipe).__name__} gives no latents with output_type='latent'")
    return latents


def _before_decoding(pipe: Any, **arguments: Any) -> Tensor:
    """Return what an `LDMPipeline` is about to decode; it has no output_type="latent"."""
    codec, seen = pipe.vqvae, []

    def keep(latents: Tensor, *_: Any, **__: Any) -> Any:
        seen.append(latents * codec.config.scaling_factor)
        # the pipeline goes on with an image, of which nothing is used
        return SimpleNamespace(sample=latents.new_zeros(len(latents), 3, 1, 1))

    codec.decode = keep
    try:
        pipe(**arguments, output_type="pil")
    finally:
        del codec.decode  # the class's own shows again
    return seen[0]


@contextmanager
def scaled_attention(
    pipe: Any, height: int | None = None, width: int | None = None, *, on: bool = True
) -> Iterator[None]:
    """Correct a base's self-attention for an image size that it was not trained for, while the block runs.

    The scale of the softmax becomes sqrt(log_T(N) / d) instead of sqrt(1 / d), with T tokens in training and
    N now (arXiv 2306.08645, and section 6.2 of 2312.07360). At the trained size nothing changes.

    Args:
        pipe: a diffusers pipeline with a `unet`.
        height: of the images that it will make, in pixels; None for that it was trained at.
        width: likewise.
        on: False changes nothing.

    Raises:
        UserError: the base has no U-Net; the correction was measured for those only.
    """
    if not on:
        yield
        return
    unet = pipe.components.get("unet")
    if unet is None:
        raise UserError(
            f"{type(pipe).__name__} has no U-Net, and only there is attention scaled; leave that out"
        )
    trained = pair(unet.config.sample_size)
    factor = Codec(codec_of(pipe)).factor
    now = [t if side is None else side // factor for t, side in zip(trained, (height, width), strict=True)]
    layers = [m for m in unet.modules() if isinstance(m, Attention) and not m.is_cross_attention]
    before = [layer.processor for layer in layers]
    for layer in layers:
        layer.set_processor(ScaledAttention(layer.processor, math.prod(trained) / math.prod(now)))
    try:
        yield
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.set_processor(processor)


class ScaledAttention:
    """An attention processor for self-attention with the scale sqrt(log_T(N) / d).

    Args:
        processor: which computes the attention.
        trained: T / N, how many times more tokens there were in training; the same in every level.
    """

    def __init__(self, processor: Any, trained: float) -> None:
        self.processor, self.trained = processor, trained

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the attention of tokens (B, N, C), or (B, C, H, W), to each other."""
        now = math.prod(hidden_states.shape[1:-1] if hidden_states.ndim == 3 else hidden_states.shape[2:])
        return self.processor(_ScaledQueries(attn, self.factor(now)), hidden_states, *args, **kwargs)

    def factor(self, now: int) -> float:
        """Return sqrt(log_T(N)) for N tokens, by how much all queries are multiplied."""
        before = now * self.trained
        return math.sqrt(math.log(now) / math.log(before)) if min(now, before) > 1 else 1.0


class _ScaledQueries:
    """An attention layer whose queries are a number of times longer, which is a scale of the softmax."""

    def __init__(self, attn: Any, factor: float) -> None:
        self._attn, self._factor = attn, factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def to_q(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._attn.to_q(x, *args, **kwargs) * self._factor
