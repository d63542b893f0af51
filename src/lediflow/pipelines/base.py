"""What both pipelines share: batches of a request, per-image seeds, precision, PIL images, loading."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput, logging
from PIL import Image
from torch import Tensor

from lediflow.codecs import Codec, LatentSpace
from lediflow.data.images import to_uint8
from lediflow.errors import UserError
from lediflow.networks.hourglass import pair
from lediflow.networks.model import Network, SafetensorsOnly
from lediflow.ode import check_solver
from lediflow.pipelines.guidance import ClassLabels, check_labels
from lediflow.sources import image_noise, put


@dataclass
class PipelineOutput(BaseOutput):
    """What a pipeline returns.

    Attributes:
        images: list of PIL images, or a tensor (N, C, H, W) in [-1, 1] for output_type="pt", or the codec's
            latents for "latent".
        nfe: evaluations of each network that one image took, by the network's name; a guided one, with the
            class and without, counts as two.
    """

    images: list[Image.Image] | Tensor = field(default_factory=list)
    nfe: dict[str, int] = field(default_factory=dict)


class ImagePipeline(SafetensorsOnly, DiffusionPipeline):
    """Base of the pipelines: a request is cut into batches, and image i depends on (seed, i) only.

    A flow in a codec's latents has their `latent_space` (a `LatentSpace` as a dict) in its config. The codec
    itself is the optional component `vae`: left out of a run's folder, loaded when images are first asked
    for, and saved by `save_pretrained` from then on, which makes a folder that needs nothing else.
    """

    _optional_components = ["vae"]  # noqa: RUF012  what diffusers reads
    _one_graph: Callable[..., tuple[Tensor, dict[str, int]]] | None = None  # what `compile` made of `_images`

    def load_codec(self, name: str | Path | None = None) -> None:
        """Load the codec of the latents from where it was when they were made, or from `name`.

        Raises:
            UserError: the flow makes pixels, or the codec is not there, or it is another one.
        """
        if self.config.latent_space is None:
            raise UserError("this model makes pixels; it has no codec")
        space = LatentSpace.from_dict(self.config.latent_space)
        try:
            codec = space.load_codec(device=self.device, name=None if name is None else str(name))
        except UserError as error:
            raise UserError(
                f"{error}. The model makes latents of {space.codec!r}: give that codec's folder with "
                "--codec or load_codec(FOLDER), or take the latents with output_type='latent'"
            ) from None
        self.register_modules(vae=codec.model)

    @abstractmethod
    def settle(
        self,
        *,
        solver: str | None = None,
        steps: int | None = None,
        latent_solver: str | None = None,
        latent_steps: int | None = None,
    ) -> dict[str, Any]:
        """Return the arguments of a request with the solvers and steps that None stands for.

        Returns:
            "solver" and "steps", and for a model with a latent sampler "latent_solver" and "latent_steps";
            what is given for a latent sampler that is not there is left out.

        Raises:
            UserError: unknown solver, steps below 1, or "mean" for a network without average velocity.
        """

    @abstractmethod
    def _noise(self, indices: Sequence[int], seed: int) -> tuple[Tensor, ...]:
        """Draw all that is random in the images `indices` of the request, on the pipeline's device."""

    @abstractmethod
    def _images(
        self, noise: tuple[Tensor, ...], labels: Tensor | None, *, steps: int, solver: str, **options: Any
    ) -> tuple[Tensor, dict[str, int]]:
        """Turn noise into images (N, C, H, W), and count the evaluations of each network.

        With solver "mean" nothing in it waits for the device; torchdiffeq's solvers compare times there.
        """

    def compile(self, **options: Any) -> None:
        """Compile what turns noise into images, in place; the first request then takes a minute or more.

        With solver "mean", in `LeDiFlowPipeline` for flow and latent sampler, all from noise to image is one
        graph, on CUDA one CUDA graph. The other solvers are torchdiffeq's, which looks at the times between
        evaluations: with them each network is compiled for itself. All batches of more than one image share a
        graph, so a smaller last batch needs none of its own; one image alone does, and so do other steps,
        another guidance and another dtype. Weights may change afterwards.

        Args:
            options: of torch.compile. The one graph's mode is "reduce-overhead" on CUDA by default; that of
                networks is not, for a solver needs their results longer than a CUDA graph keeps them.
        """
        mode = {"mode": "reduce-overhead"} if self.device.type == "cuda" else {}
        self._one_graph = torch.compile(self._images, **mode | options)
        for name, network in self.components.items():
            if isinstance(network, Network):
                # the decoder is not its module's forward, but its blocks are nearly all of it
                network.compile_as("blocks" if name == "auxiliary" else "model", **options)

    def _generate(
        self, indices: Sequence[int], *, seed: int, class_labels: ClassLabels, **options: Any
    ) -> tuple[Tensor, dict[str, int]]:
        """Make the images `indices` of the request; return them and the evaluations of each network."""
        labels = self.labels_of(indices, class_labels)
        noise = self._noise(indices, seed)
        if self._one_graph is None or {options["solver"], options.get("latent_solver", "mean")} != {"mean"}:
            return self._images(noise, labels, **options)
        for x in (*noise, labels):
            if x is not None and len(x) > 1:
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return self._one_graph(noise, labels, **options)

    def _draw(self, shape: Sequence[int], indices: Sequence[int], seed: int, stream: str) -> Tensor:
        return image_noise(shape, seed=seed, indices=indices, stream=stream, device=self.device)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the flow makes: images, or a codec's latents."""
        config = self.flow.config
        return (config.in_channels, *pair(config.sample_size))

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in their order, empty where there are none or they are not known."""
        names = self.config.get("id2label") or {}
        return [names[str(i)] for i in range(len(names))]

    def labels_of(self, indices: Sequence[int], class_labels: ClassLabels) -> Tensor | None:
        """Return the classes of the images `indices` of a request, (n,), or None for a model without.

        Raises:
            UserError: see `guidance.check_labels`.
        """
        turn = check_labels(class_labels, self.flow.num_classes, self.config.get("id2label"))
        if not turn:
            return None
        return put(torch.tensor([turn[i % len(turn)] for i in indices]), self.device)

    def no_class(self, count: int) -> Tensor | None:
        """Return "no class" for `count` images, (count,), or None for a model without classes."""
        classes = self.flow.num_classes
        return torch.full((count,), classes, device=self.device) if classes else None

    @torch.no_grad()
    def _request(
        self,
        num_images: int,
        *,
        first_image: int,
        steps: int,
        solver: str,
        seed: int,
        batch_size: int,
        dtype: torch.dtype | None,
        output_type: Literal["pil", "pt", "latent"],
        **options: Any,
    ) -> PipelineOutput:
        check_solver(solver, steps)
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        space = self.config.latent_space
        known = ("pil", "pt", "latent") if space else ("pil", "pt")
        if output_type not in known:
            raise UserError(f"output_type must be {' or '.join(map(repr, known))}, not {output_type!r}")
        if space and self.vae is None and output_type != "latent":
            self.load_codec()
        images = []
        wanted = range(first_image, first_image + num_images)
        with self.progress_bar(total=num_images) as bar:
            for start in range(0, num_images, batch_size):
                indices = wanted[start : start + batch_size]
                with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                    batch, nfe = self._generate(indices, seed=seed, steps=steps, solver=solver, **options)
                images.append(self._visible(batch.float(), nfe, output_type))
                bar.update(len(indices))
        joined = torch.cat(images)
        return PipelineOutput(images=to_pil(joined) if output_type == "pil" else joined, nfe=nfe)

    def _visible(self, batch: Tensor, nfe: dict[str, int], output_type: str) -> Tensor:
        """Clamp pixels; undo the scale of latents, and decode them unless they are what is wanted."""
        if self.config.latent_space is None:
            return batch.clamp(-1, 1)
        latents = LatentSpace.from_dict(self.config.latent_space).denormalize(batch)
        if output_type == "latent":
            return latents
        nfe["codec"] = 1
        return Codec(self.vae).decode(latents)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Turn images (N, C, H, W) in [-1, 1], C 1 or 3, into PIL images of mode L or RGB."""
    arrays = to_uint8(images).movedim(1, -1).cpu().numpy()
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]


def load_pipeline(model: str | Path, **kwargs: Any) -> ImagePipeline:
    """Load MODEL: a run folder, a stage folder with a pipeline, a saved pipeline, or a Hub id.

    Raises:
        UserError: there is no such folder, or it has no weights, or they are damaged.
    """
    from lediflow.pipelines.flow_matching import FlowMatchingPipeline
    from lediflow.pipelines.lediflow import LeDiFlowPipeline

    path = Path(model)
    if not path.exists() and (path.is_absolute() or str(model).count("/") != 1):
        raise UserError(
            f"no model {model}: give a run folder, a saved pipeline folder, or a Hub id owner/name"
        )
    source: str | Path = model
    if path.exists():
        folders = [f for f in (path, path / "pipeline") if (f / "model_index.json").is_file()]
        if not folders:
            raise UserError(
                f"{model} has no trained pipeline (no model_index.json in it or in its pipeline folder); "
                "train all of auxiliary, flow and sampler first, or name RUN/baseline for plain flow matching"
            )
        source = folders[0]
    classes = {c.__name__: c for c in (LeDiFlowPipeline, FlowMatchingPipeline)}
    try:
        name = DiffusionPipeline.load_config(source)["_class_name"]
        if name not in classes:
            raise UserError(f"{model} is a {name}, not one of {', '.join(classes)}")
        logging.disable_progress_bar()  # reading a folder takes a blink
        return classes[name].from_pretrained(source, **kwargs)
    except UserError:
        raise
    except Exception as error:  # diffusers, the Hub and safetensors each raise their own kinds
        raise UserError(f"cannot load {model}: {str(error).splitlines()[0]}") from error
    finally:
        logging.enable_progress_bar()
