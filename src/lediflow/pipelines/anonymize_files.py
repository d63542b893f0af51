"""Photos in files -> photos with other faces in a folder of their own. No original is ever written to."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lediflow import __version__
from lediflow.errors import UserError
from lediflow.faces import Alignment, Face
from lediflow.files import explained, written_whole
from lediflow.pipelines.anonymize import Anonymizing, Features, face_regions, face_seeds, same_persons
from lediflow.pipelines.upright import read_upright
from lediflow.progress import Progress

Find = Callable[[Image.Image], list[Face]]


@dataclass(frozen=True)
class PhotoFile:
    """A photo: where it lies, and the name of what is made of it, below the output folder."""

    path: Path
    name: Path


@dataclass(frozen=True)
class SameFaces:
    """How to tell persons apart; see `Anonymizing.anonymize`."""

    features: Features | None
    same_person: float


def anonymize_files(
    pipeline: Anonymizing,
    files: Sequence[PhotoFile],
    output: Path,
    find: Find,
    *,
    alignment: Alignment,
    seed: int | None = None,
    same: SameFaces | None = None,
    mask: Any = None,
    silent: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Write the photos with other faces, each as soon as it is made; return what became of each.

    A photo that cannot be read, or in which no face is found, is told of and not written.

    Args:
        pipeline: makes the faces.
        files: the photos.
        output: folder.
        find: returns the faces of a photo.
        alignment: see `Anonymizing.anonymize`.
        seed: of the request; None for one that nobody knows.
        same: give one person the same face in all photos; None for new ones throughout.
        mask: (H, W), what is to be changed, where `find` takes the faces from it.
        silent: show no progress.
        options: of `inpaint`.

    Returns:
        For each photo "file", "output" or None, "found" and "treated" in numbers, and "faces" with "box" (x,
        y, width, height), "score" and, with `same`, "person"; or "error" in place of the last.

    Raises:
        UserError: what the pipeline refuses, or `output` cannot be written.
    """
    seed = secrets.randbits(62) if seed is None else seed
    persons = _persons(pipeline, files, find, alignment, same, silent) if same else {}
    reports = []
    with Progress("photos", 0, len(files), silent=silent) as progress:
        for file, photo, faces, report in _looked_at(files, find):
            reports.append(report)
            if photo is not None and faces:
                who = persons.get(file, [])
                for face, person in zip(report["faces"], who, strict=False):
                    face["person"] = person
                seeds = face_seeds(seed, str(file.name), len(faces), who)
                regions = face_regions(faces, alignment, mask)
                treated, report["nfe"] = pipeline.replace_faces(photo, regions, seeds, **options)
                _save(treated, output / file.name, f"faces replaced by a generative model: {len(faces)}")
                report |= {"output": str(output / file.name), "treated": len(faces)}
            progress.update(len(reports))
    return reports


def show_boxes(
    files: Sequence[PhotoFile], output: Path, find: Find, *, silent: bool = False
) -> list[dict[str, Any]]:
    """Write previews NAME.boxes.png, the photos as they are with a frame around each face that is found.

    Returns:
        As `anonymize_files`, with nothing treated.
    """
    reports = []
    with Progress("photos", 0, len(files), silent=silent) as progress:
        for file, photo, faces, report in _looked_at(files, find):
            reports.append(report)
            if photo is not None:
                path = (output / file.name).with_suffix(".boxes.png")
                _save(_framed(photo, faces), path, f"faces found, none replaced: {len(faces)}")
                report["output"] = str(path)
            progress.update(len(reports))
    return reports


def _looked_at(
    files: Sequence[PhotoFile], find: Find
) -> Iterator[tuple[PhotoFile, Image.Image | None, list[Face], dict[str, Any]]]:
    for file in files:
        report: dict[str, Any] = {"file": str(file.path), "output": None, "found": 0, "treated": 0}
        try:
            photo = read_upright(file.path)
        except UserError as error:
            yield file, None, [], report | {"error": str(error)}
            continue
        faces = find(photo)
        described = [{"box": _rounded(face), "score": round(face.score, 3)} for face in faces]
        yield file, photo, faces, report | {"found": len(faces), "faces": described}


def _rounded(face: Face) -> list[int]:
    left, top, right, bottom = (round(side) for side in face.box)
    return [left, top, right - left, bottom - top]


def _persons(
    pipeline: Anonymizing,
    files: Sequence[PhotoFile],
    find: Find,
    alignment: Alignment,
    same: SameFaces,
    silent: bool,
) -> dict[PhotoFile, list[int]]:
    """Number the persons of all photos. The features of their faces live in this function only."""
    looks: dict[PhotoFile, Tensor] = {}
    with Progress("comparing", 0, len(files), silent=silent) as progress:
        for done, (file, photo, faces, _) in enumerate(_looked_at(files, find), start=1):
            if photo is not None and faces:
                looks[file] = pipeline.face_features(
                    photo, faces, features=same.features, alignment=alignment
                )
            progress.update(done)
    return dict(zip(looks, same_persons(list(looks.values()), same.same_person), strict=True))


def _save(picture: Image.Image, path: Path, description: str) -> None:
    """Write a PNG that says what it is, and neither whose nor from which file and seed."""
    text = PngInfo()
    text.add_text("Software", f"lediflow {__version__}")
    text.add_text("Description", description)
    with explained(path), written_whole(path) as unfinished:
        picture.save(unfinished, pnginfo=text)


def _framed(photo: Image.Image, faces: Sequence[Face]) -> Image.Image:
    framed = photo.convert("RGB")
    draw = ImageDraw.Draw(framed)
    width = max(1, round(min(photo.size) / 300))
    for face in faces:
        draw.rectangle(face.box, outline=(255, 40, 40), width=width)
        draw.text((face.box[0] + width + 1, face.box[1] + width), f"{face.score:.2f}", fill=(255, 40, 40))
    return framed
