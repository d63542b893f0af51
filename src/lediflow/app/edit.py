"""*Edit*: inpaint what is painted, restyle sketches, and put other faces in place of those in a photo."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lediflow import __version__
from lediflow.app.limits import Limits
from lediflow.app.models import Models
from lediflow.app.session import Kept, Session
from lediflow.app.uploads import input_of, open_upload
from lediflow.errors import UserError
from lediflow.faces import UTKFACE, Face, FaceDetector
from lediflow.pipelines.anonymize import face_regions, face_seeds
from lediflow.pipelines.recipes import Recipe
from lediflow.pipelines.upright import bare


@dataclass(frozen=True)
class Edited:
    """What became of a picture.

    Attributes:
        made: the variants.
        nfe: evaluations of each network for one.
        seconds: that all took.
    """

    made: list[Kept]
    nfe: dict[str, float]
    seconds: float


def inpaint(
    models: Models,
    session: Session,
    limits: Limits,
    picture: str | None,
    mask: Image.Image,
    *,
    count: int = 1,
    strength: float = 0.0,
    hide: bool = True,
    feather: int = 0,
    seed: int = 0,
    class_name: str | None = None,
) -> Edited:
    """Make anew what a mask shows; every other pixel stays bit for bit.

    Args:
        models: the models.
        session: keeps the pictures, and the mask.
        limits: of the page.
        picture: path of the uploaded picture.
        mask: of its size; white is made anew.
        count: variants.
        strength: of the change of z.
        hide: whether the encoder sees a continuation of the surroundings in place of what is masked.
        feather: pixels over which the mask's edge is softened.
        seed: of the request.
        class_name: None for none.

    Raises:
        UserError: the picture or the mask cannot be used, or a value is out of range.
    """
    photo = open_upload(picture, limits)
    settings = {
        "strength": float(strength),
        "num_images": limits.whole("the number of variants", count, limits.variants),
        "masked_content": "fill" if hide else "original",
        "feather": limits.whole("the softened edge", feather, 64, 0),
        "seed": limits.seed(seed),
        "class_labels": models.class_labels(class_name),
        "dtype": models.dtype,
    }
    began = time.perf_counter()
    out = models.pipeline.inpaint(photo, mask, **{**settings, "dtype": models.precision})
    seconds = time.perf_counter() - began
    saved = session.keep(mask, None, "the mask")
    recipe = Recipe(
        "inpaint", models.name, models.weights, settings, (input_of(picture or ""),), input_of(saved.path)
    )
    return Edited(_kept(session, recipe, out.images, "inpainted"), out.nfe, seconds)


def restyle(
    models: Models,
    session: Session,
    limits: Limits,
    picture: str | None,
    *,
    count: int = 4,
    strength: float = 0.5,
    seed: int = 0,
    class_name: str | None = None,
) -> Edited:
    """Make a sketch look like what the model was trained on (SDEdit).

    Raises:
        UserError: the picture cannot be used, or a value is out of range.
    """
    photo = open_upload(picture, limits)
    settings = {
        "strength": float(strength),
        "num_images": limits.whole("the number of variants", count, limits.variants),
        "seed": limits.seed(seed),
        "class_labels": models.class_labels(class_name),
        "dtype": models.dtype,
    }
    began = time.perf_counter()
    out = models.pipeline.restyle(photo, **{**settings, "dtype": models.precision})
    seconds = time.perf_counter() - began
    recipe = Recipe("restyle", models.name, models.weights, settings, (input_of(picture or ""),))
    return Edited(_kept(session, recipe, out.images, "restyled"), out.nfe, seconds)


# Faces


def no_detector() -> str | None:
    """Return why faces cannot be found here, None where they can."""
    try:
        FaceDetector(threads=1)
    except UserError as error:
        return str(error)
    return None


def find_faces(limits: Limits, picture: str | None) -> tuple[Image.Image, list[Face]]:
    """Return an uploaded photo and its faces.

    Raises:
        UserError: it cannot be used, or the package that finds faces is missing.
    """
    photo = bare(open_upload(picture, limits))
    return photo, FaceDetector()(photo)


def face_names(faces: Sequence[Face]) -> list[str]:
    """Return what to call the faces of a photo."""
    return [f"face {number}" for number in range(1, len(faces) + 1)]


def box_inside(face: Face, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a face's box, cut off at the border of a photo of (W, H)."""
    left, top, right, bottom = (round(side) for side in face.box)
    return max(0, left), max(0, top), min(size[0], right), min(size[1], bottom)


def anonymize(
    models: Models,
    session: Session,
    limits: Limits,
    picture: str | None,
    faces: Sequence[Face],
    chosen: Sequence[str],
    *,
    strength: float = 1.0,
    class_name: str | None = None,
) -> Edited:
    """Put new faces in place of those that are chosen; the PNG says neither whose nor of which seed.

    Args:
        models: the models.
        session: keeps the photo.
        limits: of the page.
        picture: path of the uploaded photo.
        faces: found in it.
        chosen: names of those to replace (`face_names`).
        strength: of the change of z.
        class_name: None for none.

    Raises:
        UserError: the photo cannot be used, or no face is chosen.
    """
    photo = bare(open_upload(picture, limits))
    names = face_names(faces)
    some = [face for face, name in zip(faces, names, strict=True) if name in chosen]
    if not some:
        raise UserError("no face is switched on: find the faces first, and leave those on that are replaced")
    options: dict[str, Any] = {"strength": float(strength), "masked_content": "fill"}
    options |= {"class_labels": models.class_labels(class_name), "dtype": models.precision}
    seeds = face_seeds(secrets.randbits(62), 0, len(some))
    began = time.perf_counter()
    treated, nfe = models.need_z().replace_faces(photo, face_regions(some, UTKFACE), seeds, **options)
    seconds = time.perf_counter() - began
    text = PngInfo()
    text.add_text("Software", f"lediflow {__version__}")
    text.add_text("Description", f"faces replaced by a generative model: {len(some)}")
    kept = session.keep(treated, None, f"{len(some)} of {len(faces)} faces replaced", text)
    return Edited([kept], nfe, seconds)


def _kept(session: Session, recipe: Recipe, images: Sequence[Any], what: str) -> list[Kept]:
    seed = recipe.settings["seed"]
    return [session.keep(image, recipe.of(i), f"{what} {seed} · {i}") for i, image in enumerate(images)]
