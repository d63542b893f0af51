"""What pipelines that make images share: a request as a stream of batches, per-image seeds, guidance."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lediflow.conditions import Conditions
from lediflow.devices import to_device
from lediflow.errors import UserError
from lediflow.fields import Field, guided
from lediflow.fingerprints import weights_digest
from lediflow.networks.hourglass import pair
from lediflow.networks.model import Network
from lediflow.pipelines.codec import CodecPipeline, OutputType, PipelineOutput
from lediflow.pipelines.labels import (
    ClassLabels,
    Clustering,
    Prompt,
    check_clusters,
    check_labels,
    check_prompt,
)
from lediflow.pipelines.prompts import PromptReader
from lediflow.pipelines.strengths import Strength, Temperature
from lediflow.sources import image_noise


class ImagePipeline(PromptReader, CodecPipeline):
    """Base of what makes images: a request is a stream of batches, and image i depends on (seed, i) only."""

    # what diffusers reads
    _optional_components = ["vae", "clusters", "weak_flow", "weak_sampler"]  # noqa: RUF012
    _compiled: Callable[..., tuple[Tensor, dict[str, float]]] | None = None  # what `compile` made of `_make`

    # What a pipeline is made of

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
    def _draw(self, indices: Sequence[int], seed: int) -> tuple[Tensor, ...]:
        """Draw all that is random in the images `indices` of the request, on the pipeline's device."""

    @abstractmethod
    def _make(self, *noise_and_labels: Any, **options: Any) -> tuple[Tensor, dict[str, float]]:
        """Turn noise into what the flow makes (N, C, H, W), and count the evaluations of each network.

        It takes what `_draw` and `labels_of` give, and solvers, steps and strengths of guidance by name.
        With solver "mean" nothing in it waits for the device; torchdiffeq's solvers compare times there.
        """

    def noise(self, shape: Sequence[int], indices: Sequence[int], seed: int, stream: str) -> Tensor:
        """Return standard normal noise of the images `indices` of a request, (n, *shape), on the device."""
        return image_noise(shape, seed=seed, indices=indices, stream=stream, device=self.device)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the flow makes: images, or codec latents."""
        config = self.flow.config
        return (config.in_channels, *pair(config.sample_size))

    def digest(self) -> str:
        """Return a digest of all weights but the codec's, which tells retrained models apart."""
        parts = [part for name, part in self.components.items() if name != "vae"]
        return weights_digest(*(part for part in parts if isinstance(part, nn.Module)))

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that had images, in their order; empty where there are none or no names."""
        names = self.config.get("id2label") or {}
        return [names[index] for index in sorted(names, key=int)]

    def labels_of(
        self,
        indices: Sequence[int],
        class_labels: ClassLabels = None,
        *,
        cluster: Clustering = None,
        prompt: Prompt = None,
        seed: int = 0,
    ) -> Conditions:
        """Return classes, clusters and texts of the images `indices` of a request, of those the model has.

        Beside a prompt an image has a class and a cluster only where they are asked for.

        Args:
            indices: of the images.
            class_labels: classes, which they take in turn; None for all.
            cluster: clusters, likewise; None draws image i's by (seed, i), as often as in training images.
            prompt: texts, likewise; None for no text, as is one without words.
            seed: of the request.

        Raises:
            UserError: see `labels.check_labels`, `labels.check_clusters` and `labels.check_prompt`.
        """
        prompts = check_prompt(prompt, self.reader)
        turn = check_labels(class_labels, self.flow.classes(), self.config.get("id2label"))
        clusters = check_clusters(cluster, self.clusters)
        if prompts and class_labels is None:
            turn = []
        whole = torch.long  # also of no image
        label = torch.tensor([turn[i % len(turn)] for i in indices], dtype=whole) if turn else None
        found = None
        if clusters:
            found = torch.tensor([clusters[i % len(clusters)] for i in indices], dtype=whole)
        elif self.clusters is not None and not prompts:
            normal = image_noise((1,), seed=seed, indices=indices, stream="cluster")
            found = self.clusters.draw(torch.special.ndtr(normal[:, 0]), label)
        texts = [prompts[i % len(prompts)] for i in indices] if prompts else []
        return Conditions(
            label=None if label is None else to_device(label, self.device),
            cluster=None if found is None else to_device(found, self.device),
            text=to_device(self.told(texts), self.device) if prompts else None,
        )

    # Guidance and temperature

    @property
    def temperature(self) -> float:
        """The model's own, which edited pictures start with too; 1 where it has none."""
        found: float = (self.config.get("strengths") or {}).get("temperature", 1.0)
        return found

    def strengths(self) -> dict[str, Strength | Temperature]:
        """What guides this pipeline's networks, by the name of the argument that says how strongly."""
        return {
            "temperature": Temperature(),
            "guidance": Strength(self.flow, "guidance"),
            "autoguidance": Strength(self.flow, "autoguidance", self.weak_flow, "weak-flow"),
        }

    def settle_strengths(
        self, *, labels: Sequence[str] | None = None, **asked: float | None
    ) -> dict[str, float]:
        """Return temperature and the strength of every guidance; None stands for the model's own, or 1.

        Args:
            labels: names of the conditions that the images have, such as "label"; None for all. A network
                that is told none of them has nothing to guide by.
            asked: by name.

        Raises:
            UserError: a strength that this model cannot have, or no strength at all.
        """
        known, best = self.strengths(), self.config.get("strengths") or {}
        if strange := [name for name, value in asked.items() if value is not None and name not in known]:
            raise UserError(f"{type(self).__name__} has no {strange[0]}; it has {', '.join(known)}")
        if labels is not None:
            best = {name: value for name, value in best.items() if known[name].guides_by(labels)}
        settled: dict[str, float] = {}
        for name, strength in known.items():
            value = asked.get(name)
            settled[name] = best.get(name, 1.0) if value is None else value
            strength.check(name, settled[name])
        return settled

    def flow_field(
        self, conditions: Conditions, guidance: float | None = None, autoguidance: float | None = None
    ) -> Field:
        """Return the flow's field, guided as `field` says; None for the model's own strength."""
        labels = conditions.labels
        settled = self.settle_strengths(labels=labels, guidance=guidance, autoguidance=autoguidance)
        return self.field(self.flow, conditions, settled["guidance"], settled["autoguidance"], self.weak_flow)

    def field(
        self,
        network: Any,
        conditions: Conditions,
        guidance: float = 1.0,
        autoguidance: float = 1.0,
        weak: Any = None,
        count: int | None = None,
    ) -> Field:
        """Return the field of a network, guided (see `fields.guided`).

        A network that has learned its guidance is told the strength, and takes one evaluation.

        Args:
            network: flow or latent sampler.
            conditions: a row for each image; those that the network does not have are left out.
            guidance: by class, cluster and text.
            autoguidance: away from `weak`.
            weak: the worse network.
            count: of images; None where a condition tells it.

        Raises:
            UserError: guidance without classes, clusters and texts.
        """
        told = network.config.get("conditions") or {}
        asked, rest = {"guidance": guidance, "autoguidance": autoguidance}, {}
        count = len(next(iter(conditions.values()), ())) if count is None else count
        for name, value in asked.items():
            if name in told and count:
                strength = torch.full((count,), value, device=self.device)
                conditions = conditions.also(**{name: strength})
            else:
                rest[name] = value
        conditions = conditions.only(told)
        if rest.get("guidance", 1) != 1 and not conditions.labels:
            raise UserError(
                f"guidance {guidance:g} needs a class, cluster or text that the network is told, and there "
                "is none; leave it at 1"
            )
        return guided(network, conditions, drop=conditions.labels, weak=weak, **rest)

    # A request

    @torch.no_grad()
    def stream(
        self,
        num_images: int = 1,
        *,
        seed: int = 0,
        first_image: int = 0,
        batch_size: int = 64,
        dtype: torch.dtype | None = None,
        output_type: OutputType = "pil",
        class_labels: ClassLabels = None,
        cluster: Clustering = None,
        prompt: Prompt = None,
        **options: Any,
    ) -> Iterator[PipelineOutput]:
        """Make images and hand over each batch as soon as it is finished; arguments as in `__call__`.

        However many images are asked for, memory holds one batch.

        Raises:
            UserError: when the first batch is asked for; see `__call__`.
        """
        strengths = {name: options.pop(name) for name in self.strengths() if name in options}
        told: dict[str, Any] = {"class_labels": class_labels, "cluster": cluster, "prompt": prompt}
        options = self.settle(**options)
        self.check_request(num_images, batch_size=batch_size, output_type=output_type, **told)
        options |= self.settle_strengths(labels=self.labels_of([], **told).labels, **strengths)
        if self.config.codec_space and self.vae is None and output_type != "latent":
            self.load_codec()
        wanted = range(first_image, first_image + num_images)
        with self.progress_bar(total=num_images) as bar:
            for start in range(0, num_images, batch_size):
                indices = wanted[start : start + batch_size]
                noise = self._draw(indices, seed)
                labels = self.labels_of(indices, **told, seed=seed)
                with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                    made, nfe = self._run(noise, labels, options)
                yield self._finish(made.float(), nfe, output_type)
                bar.update(len(indices))

    def check_request(
        self,
        num_images: int = 1,
        *,
        batch_size: int = 64,
        output_type: str = "pil",
        class_labels: ClassLabels = None,
        cluster: Clustering = None,
        prompt: Prompt = None,
    ) -> None:
        """Refuse a request that cannot work, before anything is made.

        Raises:
            UserError: counts below 1, an unknown output type, class or cluster, or a prompt that is no use.
        """
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        known = ("pil", "pt", "latent") if self.config.codec_space else ("pil", "pt")
        if output_type not in known:
            raise UserError(f"output_type must be {' or '.join(map(repr, known))}, not {output_type!r}")
        if told := check_prompt(prompt, self.reader):
            self.check_told(told)
        self.labels_of([], class_labels, cluster=cluster, prompt=prompt)

    # Compiling

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
        self._compiled = torch.compile(self._make, **mode | options)
        for name, network in self.components.items():
            if isinstance(network, Network):
                # the decoder is not its module's forward, but its blocks are nearly all of it
                network.compile_as("blocks" if name == "auxiliary" else "model", **options)

    def _run(
        self, noise: tuple[Tensor, ...], labels: Conditions, options: dict[str, Any]
    ) -> tuple[Tensor, dict[str, float]]:
        """Call `_make`, or what it was compiled to where the solvers let it be one graph."""
        if self._compiled is None or {options["solver"], options.get("latent_solver", "mean")} != {"mean"}:
            return self._make(noise, labels, **options)
        for x in (*noise, *labels.values()):
            if len(x) > 1:
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return self._compiled(noise, labels, **options)
