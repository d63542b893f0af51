"""*Explore*: a way between two pictures that answers while a slider moves, and variations around one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lediflow.app.create import create
from lediflow.app.limits import Limits
from lediflow.app.models import Models
from lediflow.app.session import Kept, Session
from lediflow.app.uploads import input_of, open_upload
from lediflow.conditions import Conditions
from lediflow.pipelines.latent_start import latent_solvers
from lediflow.pipelines.recipes import Recipe
from lediflow.sources import between

STOPS = 101  # places of the slider, both ends included
AROUND = 8  # variations, which with their centre are a grid of 3 x 3


@dataclass(frozen=True)
class Way:
    """From one picture to another; all that does not depend on the place is computed once.

    Attributes:
        models: the models.
        ends: w of both, (c, h, w).
        noise: of x ~ P_L, (1, C, H, W), the same along the way.
        labels: the class, a row.
        settings: of `interpolate`, which makes the same pictures.
        inputs: the ends, for the recipe.
    """

    models: Models
    ends: tuple[Tensor, Tensor]
    noise: Tensor
    labels: Conditions
    settings: Mapping[str, Any]
    inputs: tuple[Mapping[str, Any], ...]

    @torch.no_grad()
    def at(self, stop: int) -> tuple[Image.Image, dict[str, float], float]:
        """Return the picture at a place of the slider, 0 to `STOPS` - 1, its evaluations and seconds."""
        began = time.perf_counter()
        pipeline = self.models.need_z()
        share = min(max(stop, 0), STOPS - 1) / (STOPS - 1)
        _, forth = latent_solvers(self.settings["latent_solver"], self.settings["latent_steps"])
        dtype = self.models.precision
        with torch.autocast(pipeline.device.type, dtype=dtype, enabled=dtype is not None):
            w = between(*self.ends, share, "slerp")[None]
            latent = pipeline.sample_z(w, self.labels, **forth)
            x = pipeline.source(latent.end, self.noise)
            solver = {name: self.settings[name] for name in ("solver", "steps")}
            end = pipeline.carry(x, latent.end, self.labels, **solver)
        nfe = {"sampler": latent.nfe, "decoder": 1, "flow": end.nfe}
        out = pipeline._finish(end.end.float(), nfe, "pil")
        return out.images[0], out.nfe, time.perf_counter() - began

    def recipe(self, stop: int) -> Recipe:
        """Return what makes the picture of a place again."""
        recipe = Recipe(
            "interpolate", self.models.name, self.models.weights, self.settings, inputs=self.inputs
        )
        return recipe.of(min(max(stop, 0), STOPS - 1))


def way_between(
    models: Models, limits: Limits, ends: tuple[Any, Any], class_name: str | None = None, seed: int = 0
) -> Way:
    """Prepare the way between two ends.

    Args:
        models: the models.
        limits: of the page.
        ends: of each its seed, a whole number, or the path of an uploaded picture.
        class_name: of both; None for none.
        seed: of the noise of x.

    Raises:
        UserError: an end cannot be used, or the model has no latent z.
    """
    pipeline = models.need_z()
    class_labels = models.class_labels(class_name)
    # "mean" has no way back, which only pictures need: one evaluation on the way forth all the same
    latent = "mean" if pipeline.sampler.average_velocity else None
    settings = {
        "num_images": STOPS,
        "space": "noise",
        "path": "slerp",
        "seed": limits.seed(seed),
        **{name: value for name, value in pipeline.settle().items() if not name.startswith("latent")},
        "latent_solver": latent,
        "latent_steps": None,
        "batch_size": 1,
        "class_labels": class_labels,
        "dtype": models.dtype,
    }
    labels = Conditions() if class_labels is None else pipeline.labels_of([0], class_labels)
    inputs: list[dict[str, Any]] = []
    points = []
    for end in ends:
        if isinstance(end, str | Path):
            inputs.append(input_of(end))
            points.append(_noise_of(models, open_upload(end, limits), class_labels))
        else:
            inputs.append({"seed": limits.seed(end)})
            points.append(pipeline.noise(pipeline.auxiliary.z_shape, [0], limits.seed(end), "w")[0])
    noise = pipeline.noise(pipeline.sample_shape, [0], settings["seed"], "x")
    if pipeline.config.codec_space and pipeline.vae is None:
        pipeline.load_codec()
    return Way(models, (points[0], points[1]), noise, labels, settings, tuple(inputs))


def first_picture(
    models: Models, session: Session, limits: Limits, seed: Any, class_name: str | None = None
) -> str:
    """Make and keep the first picture of a seed, and return its path.

    Raises:
        UserError: a seed or class that there is not.
    """
    asked = {"seed": seed, "count": 1, "class_labels": class_name}
    (progress,) = create(models, session, limits, asked)
    return str(progress.done[0].path)


def vary(
    models: Models,
    session: Session,
    limits: Limits,
    picture: str | Path | None,
    *,
    strength: float,
    seed: int,
    class_name: str | None = None,
) -> tuple[list[Kept], dict[str, float], float]:
    """Make `AROUND` variations of a picture (figure 6), and keep them.

    Returns:
        The pictures, the evaluations of networks for one, and the seconds that all took.

    Raises:
        UserError: the picture cannot be used, or the model has no latent z.
    """
    pipeline = models.need_z()
    photo = open_upload(picture, limits)
    settings = {
        "strength": float(strength),
        "num_images": AROUND,
        "seed": limits.seed(seed),
        "class_labels": models.class_labels(class_name),
        "batch_size": AROUND,
        "dtype": models.dtype,
    }
    began = time.perf_counter()
    out = pipeline.vary(photo, **{**settings, "dtype": models.precision})
    seconds = time.perf_counter() - began
    recipe = Recipe("vary", models.name, models.weights, settings, inputs=(input_of(picture or ""),))
    kept = [session.keep(image, recipe.of(i), f"{seed} · {i}") for i, image in enumerate(out.images)]
    return kept, out.nfe, seconds


def centred(centre: str, around: list[Kept]) -> list[tuple[str, str]]:
    """Return the grid of 3 x 3: the centre, and its variations around it, with captions."""
    cells = [(str(one.path), one.caption) for one in around]
    return [*cells[: AROUND // 2], (centre, "the centre"), *cells[AROUND // 2 :]]


def _noise_of(models: Models, photo: Image.Image, class_labels: Any) -> Tensor:
    """Return the w (c, h, w) that a picture's z comes from, as `interpolate` finds it."""
    back, _ = latent_solvers(None, None)
    found = models.need_z().invert(
        photo,
        latent_steps=back["steps"],
        latent_solver=back["solver"],
        steps=1,  # x is not needed
        solver="euler",
        class_labels=class_labels,
        dtype=models.precision,
    )
    return found.w[0]
