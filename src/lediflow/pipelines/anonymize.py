"""Put a new face in place of each face of a photo, by inpainting (eq. 7) from a changed z (section 4.2)."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lediflow.errors import UserError
from lediflow.faces import LEAST_SCORE, SMALLEST, UTKFACE, Alignment, Face, FaceDetector
from lediflow.pictures import to_float
from lediflow.pipelines.codec import PipelineOutput
from lediflow.pipelines.face_regions import FaceRegion, face_region
from lediflow.pipelines.inpainting import Inpainting, check_strength
from lediflow.pipelines.photos import mask_tensor
from lediflow.pipelines.upright import bare
from lediflow.sources import derive_seed

Box = Sequence[float]  # x, y, width, height in pixels
Features = Callable[[Tensor], Tensor]  # images (N, C, H, W) in [-1, 1] -> features (N, D)
SAME_PERSON = 0.7  # least cosine similarity of two faces that `consistent` takes for one person's
LEAST_BOX = 4  # pixels
MOST_PARTS = 200  # of a mask


@dataclass
class AnonymizedOutput(PipelineOutput):
    """What `anonymize` returns: PIL images without metadata, and what was found in each photo.

    Attributes:
        found: for each photo, its faces; empty where there are none, and that photo is as it was.
        persons: for each photo the number of the person that each face was taken for; empty lists where
            `consistent` was not asked for.
    """

    found: list[list[Face]] = field(default_factory=list)
    persons: list[list[int]] = field(default_factory=list)


class Anonymizing(Inpainting):
    """Mixin of LeDiFlowPipeline: `anonymize`."""

    def anonymize(
        self,
        image: Image.Image | Sequence[Image.Image],
        boxes: Sequence[Box] | None = None,
        mask_image: Image.Image | None = None,
        *,
        strength: float = 1.0,
        seed: int | None = None,
        consistent: bool = False,
        features: Features | None = None,
        same_person: float = SAME_PERSON,
        detector: FaceDetector | None = None,
        smallest: float = SMALLEST,
        least_score: float = LEAST_SCORE,
        alignment: Alignment = UTKFACE,
        masked_content: Literal["original", "fill"] = "fill",
        **options: Any,
    ) -> AnonymizedOutput:
        """Replace the faces of photos by new ones.

        Each face is cut out as a square that lies as the model's training pictures do, made anew inside an
        ellipse, and blended back into the photo at full resolution. Pixels outside of the ellipses are the
        photo's own, bit for bit. `found` of the result says what was found; look at it.

        Args:
            image: a PIL image, or several.
            boxes: of the faces, (x, y, width, height) in pixels, for one photo; None to find them.
            mask_image: what is to be replaced, for one photo, in place of `boxes`: white is replaced, grey
                blended. Each connected part is taken for a face.
            strength: of the change of z, 0 to 1, as in `inpaint`.
            seed: of the new faces; None for one that nobody knows. Face i of photo p depends on (seed, p, i).
            consistent: give faces that look like one person's the same seed in all photos.
            features: to compare faces by, for `consistent`; None for the model's own encoder. They are
                computed, compared, and not kept.
            same_person: least cosine similarity of one person's faces.
            detector: a `FaceDetector`; None for a new one.
            smallest: side in pixels of the smallest face to look for.
            least_score: of a face, 0 to 1; lower finds more faces, and more that are none.
            alignment: where faces lie in the pictures that the model was trained on (`measure_alignment`).
            masked_content: "fill" hides the old face from the encoder; "original" shows it, and the new one
                resembles it.
            options: of `inpaint`: steps, solver, latent_steps, latent_solver, dtype, class_labels.

        Returns:
            An `AnonymizedOutput`: PIL images of the photos' size, grey or coloured as they are and with their
            alpha channel, without metadata. Its nfe is that of one face.

        Raises:
            UserError: a box outside of the photo, a mask of another size or black everywhere, both boxes and
                a mask, strength outside [0, 1], or no package to find faces with.
        """
        check_strength(strength)
        photos = [bare(photo) for photo in ([image] if isinstance(image, Image.Image) else image)]
        if (boxes is not None or mask_image is not None) and len(photos) != 1:
            raise UserError(f"boxes or a mask belong to one photo, not to {len(photos)}; give one at a time")
        if boxes is not None and mask_image is not None:
            raise UserError("give boxes or a mask, not both")
        mask = None
        if boxes is not None:
            found = [faces_in_boxes(boxes, photos[0].size)]
        elif mask_image is not None:
            mask = mask_values(mask_image, photos[0].size)
            found = [faces_in_mask(mask)]
        else:
            detector = detector or FaceDetector()
            found = [detector(photo, smallest=smallest, least_score=least_score) for photo in photos]
        out = AnonymizedOutput(found=found, persons=[[] for _ in photos])
        if consistent:
            looks = [
                self.face_features(photo, faces, features=features, alignment=alignment)
                for photo, faces in zip(photos, found, strict=True)
            ]
            out.persons = same_persons(looks, same_person)
        seed = secrets.randbits(62) if seed is None else seed
        for index, (photo, faces, who) in enumerate(zip(photos, found, out.persons, strict=True)):
            treated, nfe = self.replace_faces(
                photo,
                face_regions(faces, alignment, mask),
                face_seeds(seed, index, len(faces), who),
                strength=strength,
                masked_content=masked_content,
                **options,
            )
            out.images.append(treated)
            out.nfe = out.nfe or nfe
        return out

    def replace_faces(
        self, photo: Image.Image, regions: Iterable[FaceRegion], seeds: Sequence[int], **options: Any
    ) -> tuple[Image.Image, dict[str, float]]:
        """Return a photo with new faces, and the evaluations for one of them.

        Args:
            photo: of mode L, LA, RGB or RGBA, as `read_upright` gives it.
            regions: of its faces.
            seeds: of the new faces.
            options: of `inpaint`.
        """
        colours = photo.convert(photo.mode.rstrip("A"))
        nfe: dict[str, float] = {}
        for region, seed in zip(regions, seeds, strict=True):
            made = self.inpaint(region.cut(colours), region.generated(), seed=seed, **options)
            colours, nfe = region.paste(colours, made.images[0]), made.nfe
        if photo.mode.endswith("A"):
            colours.putalpha(photo.getchannel("A"))
        return colours, nfe

    @torch.no_grad()
    def face_features(
        self,
        photo: Image.Image,
        faces: Sequence[Face],
        *,
        features: Features | None = None,
        alignment: Alignment = UTKFACE,
    ) -> Tensor:
        """Return features (N, D) of the aligned faces of a photo, float32 on the CPU.

        Args:
            photo: as in `replace_faces`.
            faces: in it, from boxes or the detector.
            features: what computes them; None for the mean of q(z|y) of the model's own encoder,
                standardised.
            alignment: see `anonymize`.
        """
        channels, *size = self.picture_shape()
        colours = photo.convert("L" if channels == 1 else "RGB")
        squares = [face_region(face, alignment).cut(colours).resize(size[::-1]) for face in faces]
        if not squares:
            return torch.zeros(0, 1)
        pixels = torch.stack([torch.from_numpy(np.array(square)) for square in squares])
        images = to_float(pixels[:, None] if channels == 1 else pixels.movedim(-1, 1))
        if features is not None:
            return features(images).flatten(1).float().cpu()
        return self.auxiliary.standardize(self.encode(self._to_flow(images)).mean).flatten(1).float().cpu()


def face_seeds(seed: int, photo: int | str, faces: int, persons: Sequence[int] = ()) -> list[int]:
    """Return the seed of each face: of (seed, photo, face), or of (seed, person) where persons are known."""
    if persons:
        return [derive_seed(seed, "person", person) for person in persons]
    return [derive_seed(seed, "face", photo, face) for face in range(faces)]


def same_persons(features: Sequence[Tensor], least: float = SAME_PERSON) -> list[list[int]]:
    """Number the persons in photos, by agglomerative clustering with complete linkage.

    All faces of one person are at least `least` alike, and no two of them are in the same photo.

    Args:
        features: (N, D) of the faces of each photo.
        least: cosine similarity.

    Returns:
        For each photo the person's number for each face, from 0 in order of appearance.

    Raises:
        UserError: `least` is outside (-1, 1).
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if not -1 < least < 1:
        raise UserError(f"the similarity of one person's faces must be between -1 and 1, not {least:g}")
    photo = [index for index, found in enumerate(features) for _ in range(len(found))]
    if len(photo) < 2:
        return [[0] * len(found) for found in features]
    rows = torch.cat([found for found in features if len(found)]).double()
    unit = torch.nn.functional.normalize(rows, dim=1).numpy()
    distance = np.clip(1 - unit @ unit.T, 0, 2)
    distance[np.equal.outer(photo, photo)] = 9  # nobody is in a photo twice
    np.fill_diagonal(distance, 0)
    found_clusters = fcluster(linkage(squareform(distance, checks=False), "complete"), 1 - least, "distance")
    number: dict[int, int] = {}
    names = iter([number.setdefault(int(cluster), len(number)) for cluster in found_clusters])
    return [[next(names) for _ in range(len(found))] for found in features]


def faces_in_boxes(boxes: Sequence[Box], size: tuple[int, int]) -> list[Face]:
    """Return what a person said where faces are, as faces without landmarks.

    Args:
        boxes: (x, y, width, height) in pixels.
        size: (W, H) of the photo.

    Raises:
        UserError: none, or one that is not four numbers, is under 4 pixels, or leaves the photo.
    """
    if not len(boxes):
        raise UserError("boxes is empty; give at least one, or leave it out to find the faces")
    faces = []
    for box in boxes:
        if len(box) != 4 or not np.isfinite(np.asarray(box, float)).all():
            raise UserError(f"a box is x, y, width and height in pixels, not {tuple(box)}")
        x, y, width, height = (float(side) for side in box)
        name = f"the box {x:g},{y:g},{width:g},{height:g}"
        if min(width, height) < LEAST_BOX:
            raise UserError(f"{name} is under {LEAST_BOX} pixels; a box is x, y, width and height")
        if x < 0 or y < 0 or x + width > size[0] or y + height > size[1]:
            raise UserError(f"{name} leaves the photo, which is {size[0]}x{size[1]} pixels")
        faces.append(Face((x, y, x + width, y + height)))
    return faces


def mask_values(mask_image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Return a mask as (H, W) in [0, 1].

    Raises:
        UserError: of another size than (W, H), or black everywhere.
    """
    return mask_tensor(mask_image, None, (size[1], size[0]))[0].numpy()


def faces_in_mask(mask: np.ndarray) -> list[Face]:
    """Return the connected parts of a mask (H, W), each as a face without landmarks.

    Raises:
        UserError: there are more than `MOST_PARTS`.
    """
    from scipy.ndimage import find_objects

    parts = find_objects(_parts(mask))
    if len(parts) > MOST_PARTS:
        raise UserError(
            f"the mask has {len(parts)} separate parts, and each is taken for a face; paint one patch a face"
        )
    return [Face((c.start, r.start, c.stop, r.stop)) for r, c in parts]


def face_regions(
    faces: Sequence[Face], alignment: Alignment, mask: np.ndarray | None = None
) -> Iterator[FaceRegion]:
    """Yield the region of each face; of those that `faces_in_mask` found, with its part of the mask."""
    labels = None if mask is None else _parts(mask)
    for number, face in enumerate(faces, start=1):
        part = None if mask is None else np.where(labels == number, mask, 0).astype(np.float32)
        yield face_region(face, alignment, part)


def _parts(mask: np.ndarray) -> np.ndarray:
    """Number the parts of a mask (H, W); pixels that touch at a corner belong together."""
    from scipy.ndimage import label

    return label(mask > 0, structure=np.ones((3, 3)))[0]
