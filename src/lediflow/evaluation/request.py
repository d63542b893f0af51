"""What is asked of an evaluation: its settings, and the request that makes the images of one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch

from lediflow.data.images import OF_CLASSES
from lediflow.data.listing import open_with_home
from lediflow.devices import DTYPES
from lediflow.errors import UserError, nearest
from lediflow.ode import check_solver, in_words
from lediflow.pipelines.base import ImagePipeline
from lediflow.sources import image_noise

TEXT_COLUMNS = ("text", "caption")  # where the data's own texts may be


@dataclass(frozen=True)
class Request:
    """How a row's images are made.

    Attributes:
        solver: of the flow.
        steps: of the flow.
        num_images: how many.
        seed: image i depends on (seed, i) only.
        batch_size: images at a time, and the batch that is timed.
        dtype: fp32, bf16 or fp16.
        latent_solver: of the latent sampler; None for plain flow matching, or the pipeline's default.
        latent_steps: of the latent sampler, likewise.
        guidance: strengths, of those that the pipeline has; None for its defaults.
        autoguidance: likewise.
        latent_guidance: likewise.
        latent_autoguidance: likewise.
        temperature: likewise.
        prompts: DATASET whose texts are drawn as prompts, for a model that is told texts; None for none.
    """

    solver: str
    steps: int
    num_images: int
    seed: int
    batch_size: int
    dtype: str
    latent_solver: str | None = None
    latent_steps: int | None = None
    guidance: float | None = None
    autoguidance: float | None = None
    latent_guidance: float | None = None
    latent_autoguidance: float | None = None
    temperature: float | None = None
    prompts: str | None = None

    def images(self, pipeline: ImagePipeline, indices: range, output_type: str = "pt") -> Any:
        """Make the images `indices`; return the pipeline's output, images (n, C, H, W) in [-1, 1].

        A model with classes makes all of them in turn, and one that is told texts those of the data: image
        i's is drawn by (seed, i).
        """
        options: dict[str, Any] = {name: getattr(self, name) for name in pipeline.strengths()}
        if hasattr(pipeline, "sampler"):
            options |= {"latent_solver": self.latent_solver, "latent_steps": self.latent_steps}
        if self.prompts is not None:
            drawn = drawn_prompts(texts_of(self.prompts), indices, self.seed)
            # the pipeline deals them out by i % len
            turn = indices.start % len(indices)
            options["prompt"] = drawn[len(drawn) - turn :] + drawn[: len(drawn) - turn]
        return pipeline(
            len(indices),
            first_image=indices.start,
            steps=self.steps,
            solver=self.solver,
            seed=self.seed,
            batch_size=self.batch_size,
            dtype=DTYPES[self.dtype],
            output_type=output_type,
            **options,
        )


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        data: DATASET of the real images, its training split: the reference.
        validation: DATASET of held-out images; None for the split of that name, if there is one.
        steps: of the flow.
        solvers: of the flow; empty for "midpoint", and "mean" before it for models that have an average
            velocity. A model without one leaves "mean" out.
        latent_solver: of the latent sampler; None for "mean" where it has an average velocity, else for the
            row's solver, or "midpoint" where that is "mean".
        latent_steps: of the latent sampler; None for 1 with "mean", else 4.
        guidance: strengths, each with rows of its own; empty for the models' defaults.
        autoguidance: likewise.
        latent_guidance: likewise.
        latent_autoguidance: likewise.
        temperature: likewise.
        features: feature networks; empty for CLIP, or for the classifier where CLIP is unavailable.
        num_images: generated for each row.
        reference_images: most real images that are used.
        prompts: a model that is told texts makes those of `data`; False makes it do without.
        seed: image i depends on (seed, i) only.
        batch_size: images at a time, and the batch that is timed.
        dtype: fp32, bf16 or fp16, of the models.
        bootstrap: replicates behind an interval; 0 for none.
        lpips: measure LPIPS of reconstructions too.
        classifier_steps: training steps of the classifier.
    """

    data: str
    validation: str | None = None
    steps: tuple[int, ...] = (1, 2, 4, 8)
    solvers: tuple[str, ...] = ()
    latent_solver: str | None = None
    latent_steps: int | None = None
    guidance: tuple[float, ...] = ()
    autoguidance: tuple[float, ...] = ()
    latent_guidance: tuple[float, ...] = ()
    latent_autoguidance: tuple[float, ...] = ()
    temperature: tuple[float, ...] = ()
    features: tuple[str, ...] = ()
    num_images: int = 1000
    reference_images: int = 50_000
    seed: int = 0
    batch_size: int = 64
    dtype: str = "fp32"
    bootstrap: int = 100
    lpips: bool = False
    classifier_steps: int = 400
    prompts: bool = True

    def __post_init__(self) -> None:
        if not self.steps:
            raise UserError("give at least one number of steps")
        for solver in self.solvers or ("midpoint",):
            for steps in self.steps:
                check_solver(solver, steps)
        check_solver(self.latent_solver or "midpoint", 1 if self.latent_steps is None else self.latent_steps)
        if self.dtype not in DTYPES:
            raise UserError(
                f"unknown dtype {self.dtype!r}{nearest(self.dtype, DTYPES)}; choose from {', '.join(DTYPES)}"
            )
        if self.num_images < 10 or self.reference_images < 10:
            raise UserError("distances between sets need at least 10 images on both sides")
        if self.batch_size < 1 or self.bootstrap < 0 or self.classifier_steps < 1:
            raise UserError("batch_size and classifier_steps must be at least 1, and bootstrap 0 or more")

    def drawn_from(self, pipeline: ImagePipeline) -> str | None:
        """Return the DATASET whose texts a pipeline is told; None where it is told none."""
        return self.data if self.prompts and pipeline.reader is not None else None

    def strengths(self, pipeline: ImagePipeline) -> list[dict[str, float]]:
        """Return every combination of temperature and the strengths of guidance that a pipeline has.

        Raises:
            UserError: one that it cannot have.
        """
        labels = ["text"] if self.drawn_from(pipeline) else None
        names = list(pipeline.strengths())
        asked: list[Any] = [getattr(self, name) or (None,) for name in names]
        return [
            pipeline.settle_strengths(labels=labels, **dict(zip(names, values, strict=True)))
            for values in product(*asked)
        ]

    def request(self, **options: Any) -> Request:
        """Return the request of one row; `options` are the solvers and steps that `pipeline.settle` gives."""
        common: dict[str, Any] = {
            name: getattr(self, name) for name in ("num_images", "seed", "batch_size", "dtype")
        }
        return Request(**options, **common)


@lru_cache(maxsize=4)
def texts_of(dataset: str, columns: Sequence[str] = TEXT_COLUMNS) -> tuple[str, ...]:
    """Return the texts of a dataset's training split.

    Raises:
        UserError: there is no such dataset, or no column of texts in it, or all are empty.
    """
    if tuple(columns) == OF_CLASSES:
        rows = open_with_home(dataset)[0]
        names = rows.features["label"].names
        return tuple(names[label] for label in rows["label"][:])
    texts = tuple(text for text in open_with_home(dataset, texts=columns)[0]["text"][:] if text)
    if not texts:
        raise UserError(f"the texts of {dataset} are all empty")
    return texts


def drawn_prompts(texts: Sequence[str], indices: Sequence[int], seed: int) -> list[str]:
    """Draw a text for each of the images `indices`, each by (seed, i) alone."""
    normal = image_noise((1,), seed=seed, indices=indices, stream="prompt")[:, 0]
    places = (torch.special.ndtr(normal.double()) * len(texts)).long().clamp_max(len(texts) - 1)
    return [texts[place] for place in places.tolist()]


def strength_words(row: Mapping[str, Any]) -> str:
    """Return guidance and temperature of a row as text, empty for none."""
    named = {
        "guidance": "g",
        "autoguidance": "w",
        "latent_guidance": "latent g",
        "latent_autoguidance": "latent w",
        "temperature": "temperature",
    }
    return ", ".join(
        f"{short} {row[name]:g}" for name, short in named.items() if row.get(name) not in (None, 1)
    )


def latent_words(options: Mapping[str, Any]) -> str:
    """Return the latent sampler's solver and steps as text, empty for a model without one."""
    if options.get("latent_solver") is None:
        return ""
    return in_words(options["latent_solver"], options["latent_steps"])
