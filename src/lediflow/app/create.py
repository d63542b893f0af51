"""*Create*: new pictures by class, text and seed, batch by batch, and the settings of an old one."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lediflow.app.limits import Limits
from lediflow.app.models import Models
from lediflow.app.session import Kept, Session
from lediflow.app.uploads import open_upload
from lediflow.errors import UserError
from lediflow.files import shown
from lediflow.pipelines.recipes import Recipe, read_recipe

BATCH = 8  # pictures that appear together; few, so that the first come soon and a stop is quick
_SETTLED = ("solver", "steps", "latent_solver", "latent_steps")
_MOST_PROMPT = 500  # letters


@dataclass(frozen=True)
class Progress:
    """How far a request is.

    Attributes:
        done: its pictures so far.
        total: how many were asked for.
        seconds: that the model took for them.
        nfe: evaluations of each network for one picture.
    """

    done: list[Kept]
    total: int
    seconds: float
    nfe: Mapping[str, float]

    def text(self) -> str:
        """Return it as a sentence."""
        count = f"{len(self.done)} of {self.total}" if len(self.done) < self.total else f"{self.total}"
        each = 1000 * self.seconds / max(1, len(self.done))
        return f"{count} pictures, {each:.0f} ms each. {evaluations(self.nfe)}"


def evaluations(nfe: Mapping[str, float]) -> str:
    """Return the evaluations of networks for one picture as a sentence."""
    parts = ", ".join(f"{name} {count:g}" for name, count in nfe.items())
    return f"Network evaluations for one picture: {parts}."


def roll() -> int:
    """Return a seed by chance, short enough to be told."""
    return secrets.randbelow(1_000_000)


def request_of(models: Models, limits: Limits, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the pipeline's call for what a visitor asked for.

    Args:
        models: the models.
        limits: of the page.
        asked: "seed", "count" and, where the model has them, "first_image", "class_labels", "cluster",
            "prompt", solvers, steps and strengths of guidance by the names of the pipeline's arguments; what
            is left out is the model's own.

    Raises:
        UserError: a value that this model cannot have, or too much of something.
    """
    steps: dict[str, Any] = {
        name: limits.whole(name.replace("_", " "), asked[name], limits.steps)
        for name in ("steps", "latent_steps")
        if asked.get(name) is not None
    }
    solvers: dict[str, Any] = {name: asked.get(name) or None for name in ("solver", "latent_solver")}
    settled = models.pipeline.settle(**solvers, **steps)
    strengths = {name: asked[name] for name in models.strengths if asked.get(name) is not None}
    request = {
        "num_images": limits.whole("the number of pictures", asked.get("count"), limits.pictures),
        "seed": limits.seed(asked.get("seed")),
        "first_image": limits.whole("the first picture", asked.get("first_image") or 0, 10**6, 0),
        "batch_size": BATCH,
        **settled,
        **models.pipeline.settle_strengths(**strengths),
        "class_labels": models.class_labels(asked.get("class_labels")),
        "cluster": _cluster_of(models, asked.get("cluster")),
        "dtype": models.dtype,
    }
    if models.takes_text:
        request["prompt"] = checked_prompt(asked.get("prompt"))
    return request


def _cluster_of(models: Models, name: Any) -> int | None:
    if name in (None, ""):
        return None
    if str(name) not in map(str, models.clusters):
        raise UserError("there is no such cluster; choose one of the list")
    return int(name)


def checked_prompt(prompt: str | None) -> str | None:
    """Return words as the pipeline takes them, None for none.

    Raises:
        UserError: there are too many.
    """
    words = (prompt or "").strip()
    if len(words) > _MOST_PROMPT:
        raise UserError(f"the words are longer than {_MOST_PROMPT} letters; use fewer")
    return words or None


def create(models: Models, session: Session, limits: Limits, asked: Mapping[str, Any]) -> Iterator[Progress]:
    """Make pictures; each batch is kept in the session, and told of, as soon as it is there.

    Raises:
        UserError: as `request_of`.
    """
    request = request_of(models, limits, asked)
    recipe = Recipe("sample", models.name, models.weights, request)
    done: list[Kept] = []
    seconds, began = 0.0, time.perf_counter()
    for out in models.pipeline.stream(**{**request, "dtype": models.precision}):
        seconds += time.perf_counter() - began
        for image in out.images:
            number = len(done)
            caption = f"{request['seed']} · {request['first_image'] + number}"  # seed and picture
            done.append(session.keep(image, recipe.of(number), caption))
        yield Progress(list(done), request["num_images"], seconds, out.nfe)
        began = time.perf_counter()


def restore(models: Models, limits: Limits, path: str | Path | None) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe of a PNG of ours, and what was asked for, as `create` takes it.

    Raises:
        UserError: it is no such PNG, of another model, made by another tool, or damaged.
    """
    open_upload(path, limits)
    path = Path(path or "")
    try:
        recipe = read_recipe(path)
    except UserError as error:
        raise UserError(str(error).replace(shown(path), shown(path.name))) from None
    if recipe.weights != models.weights:
        raise UserError(
            f"this picture was made by a model with other weights ({shown(recipe.model)[:80]}); start the "
            "app with that model to restore it"
        )
    if recipe.tool != "sample":
        raise UserError(
            f"this picture was not made on the tab Create but by {recipe.tool}; the command that makes it "
            f"again is: {shown(recipe.command())[:500]}"
        )
    try:
        asked = _asked(models, recipe.settings)
        asked["count"] = min(limits.pictures, asked["count"])
        request_of(models, limits, asked)
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
    ) as error:  # anybody may have written what it says
        reason = error if isinstance(error, UserError) else "what it says of itself is damaged"
        raise UserError(f"this picture cannot be restored: {reason}") from None
    return recipe, asked


def _asked(models: Models, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe's settings are on the page: one class or cluster, or all in turn."""
    asked: dict[str, Any] = {name: settings.get(name) for name in (*_SETTLED, *models.strengths)}
    for name in ("class_labels", "cluster"):
        value = settings.get(name)
        if isinstance(value, list):  # of the command line
            value = value[0] if len(value) == 1 else None
        asked[name] = None if value is None else str(value)
    return asked | {
        "seed": settings["seed"],
        "count": settings["num_images"],
        "first_image": settings.get("first_image", 0),
        "prompt": settings.get("prompt"),
    }


def described(kept: Kept) -> str:
    """Return a picture's settings as text, one a line, and the command that makes it again."""
    if kept.recipe is None:
        return kept.caption
    values = {k: v for k, v in kept.recipe.settings.items() if v is not None and v is not False}
    lines = [f"{name.replace('_', ' ')}: {value}" for name, value in values.items()]
    return "\n".join([kept.caption, *lines, "", kept.recipe.command()])
