"""What every pipeline returns, and the codec in whose latents it may work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from lediflow.codecs import Codec, CodecSpace
from lediflow.errors import UserError
from lediflow.hub import download_model
from lediflow.models import built_in
from lediflow.networks.model import SafetensorsOnly
from lediflow.pictures import to_pil

FORMAT = 2  # of saved pipelines; one of another format is refused
OutputType = Literal["pil", "pt", "latent"]


@dataclass
class PipelineOutput(BaseOutput):
    """What a pipeline returns.

    Attributes:
        images: list of PIL images, or a tensor (N, C, H, W) in [-1, 1] for output_type="pt", or codec latents
            for "latent".
        nfe: evaluations of each network that one image took, by the network's name; a guided one, with the
            class and without, counts as two. Of "dopri5" it is the mean over the images.
    """

    images: list[Image.Image] | Tensor = field(default_factory=list)
    nfe: dict[str, float] = field(default_factory=dict)


def mean_nfe(batches: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Return the evaluations for one image over batches (images, nfe): whole numbers, save for "dopri5"."""
    total = sum(count for count, _ in batches)
    names = batches[0][1] if batches else ()
    means = {name: sum(count * nfe[name] for count, nfe in batches) / total for name in names}
    return {name: int(mean) if mean == int(mean) else round(mean, 2) for name, mean in means.items()}


class CodecPipeline(SafetensorsOnly, DiffusionPipeline):
    """Base of pipelines whose flow carries pixels, or latents of a codec.

    A flow in codec latents has their `codec_space` (a `CodecSpace` as a dict) in its config. The codec
    itself is the optional component `vae`: left out of a run's folder, loaded when images are first asked
    for, and saved by `save_pretrained` from then on, which makes a folder that needs nothing else.
    """

    _optional_components = ["vae"]  # noqa: RUF012  what diffusers reads

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load a saved pipeline: a folder, a Hub id, or the name of a model in the package, such as "emoji".

        Raises:
            OSError: there is none, or it has no safetensors weights.
        """
        found = built_in(pretrained_model_name_or_path) or pretrained_model_name_or_path
        return super().from_pretrained(found, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: Any, **kwargs: Any) -> str:
        """Fetch a saved pipeline from the Hub, for `from_pretrained`; return its folder in the cache.

        diffusers' own refuses parts whose classes are not its own.
        """
        return download_model(str(pretrained_model_name), **kwargs)

    def load_codec(self, name: str | Path | None = None) -> None:
        """Load the codec of the latents from where it was when they were made, or from `name`.

        Raises:
            UserError: the flow makes pixels, or the codec is not there, or it is another one.
        """
        if self.config.codec_space is None:
            raise UserError("this model makes pixels; it has no codec")
        space = CodecSpace.from_dict(self.config.codec_space)
        try:
            codec = space.load_codec(device=self.device, name=None if name is None else str(name))
        except UserError as error:
            raise UserError(
                f"{error}. The model makes latents of {space.codec!r}: give that codec's folder with "
                "--codec or load_codec(FOLDER), or take the latents with output_type='latent'"
            ) from None
        self.register_modules(vae=codec.model)

    @property
    def space(self) -> CodecSpace | None:
        """Of the codec's latents; None where the flow makes pixels."""
        return None if self.config.codec_space is None else CodecSpace.from_dict(self.config.codec_space)

    def _finish(self, made: Tensor, nfe: dict[str, float], output_type: OutputType) -> PipelineOutput:
        """Clamp pixels; undo the scale of codec latents, and decode them unless they are what is wanted."""
        if self.space is None:
            images = made.clamp(-1, 1)
        else:
            images = self.space.denormalize(made)
            if output_type != "latent":
                images, nfe = Codec(self.vae).decode(images), {**nfe, "codec": 1}
        return PipelineOutput(images=to_pil(images) if output_type == "pil" else images, nfe=nfe)

    @staticmethod
    def _join(batches: Iterator[PipelineOutput]) -> PipelineOutput:
        """Return all batches of a stream as one output."""
        outputs = list(batches)
        parts: list[Any] = [output.images for output in outputs]
        whole = isinstance(parts[0], Tensor)
        images = torch.cat(parts) if whole else [image for part in parts for image in part]
        return PipelineOutput(
            images=images, nfe=mean_nfe([(len(output.images), output.nfe) for output in outputs])
        )
