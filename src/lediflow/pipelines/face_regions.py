"""The square around a face: cut out as the model's training pictures lie, and laid back into the photo.

Between pixels of the photo and the square, of side 1, lies a similarity: a turn, a scale and a shift. Only
what lies in the soft ellipse of the region, or in the mask of a person, is ever changed; every other pixel of
the photo is the one that it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lediflow.faces import Alignment, Face

# Of the ellipse's radius: what lies further out is a blend. Eyes, nose and mouth lie within 0.7.
_FEATHER = 0.85
_RIM = 0.03  # of the square's side, which stays on all sides of a face for the model to see
_CLOSEST = 1.15  # how much nearer the landmarks may bring a face than its box: those of a profile lie close
_LEAST_SIDE = 8  # pixels


@dataclass(frozen=True)
class FaceRegion:
    """Where a face lies in a photo, and what of it is changed.

    Attributes:
        turn: the similarity as a complex factor: (x + iy) * turn + shift lies in the square of side 1.
        shift: see `turn`.
        ellipse: centre x, y and radii x, y in that square.
        mask: (H, W) of the photo, 0 to 1, in place of the ellipse; None for the ellipse.
    """

    turn: complex
    shift: complex
    ellipse: tuple[float, float, float, float]
    mask: np.ndarray | None = None

    @property
    def side(self) -> int:
        """Side of the square in pixels, one of its pixels being as large as one of the photo."""
        return max(_LEAST_SIDE, round(1 / abs(self.turn)))

    def cut(self, photo: Image.Image) -> Image.Image:
        """Return the square (side, side) of a photo of mode L or RGB; beyond the border it is mirrored."""
        left, top, right, bottom = self._frame()
        rows = _mirrored(np.arange(top, bottom), photo.height)
        columns = _mirrored(np.arange(left, right), photo.width)
        around = Image.fromarray(np.asarray(photo)[rows][:, columns])
        back = 1 / self.turn
        start = -self.shift * back - complex(left, top)
        return _transformed(around, (self.side, self.side), back / self.side, start)

    def generated(self) -> Image.Image:
        """Return the mask of the square, mode L: 255 where anything is made anew."""
        if self.mask is not None:
            values = Image.fromarray(np.where(self.mask > 0, 255, 0).astype(np.uint8))
            return self.cut(values).point(lambda value: 255 if value else 0)
        x, y = np.meshgrid(*[(np.arange(self.side) + 0.5) / self.side] * 2)
        return Image.fromarray(np.where(self._radius(x, y) < 1, 255, 0).astype(np.uint8))

    def paste(self, photo: Image.Image, square: Image.Image) -> Image.Image:
        """Return the photo with the square blended in.

        Args:
            photo: mode L or RGB.
            square: (side, side), of any mode.
        """
        rows, columns = self._inside(photo.size)
        corner = complex(columns.start, rows.start)
        size = (columns.stop - columns.start, rows.stop - rows.start)
        new = _transformed(
            square.convert(photo.mode),
            size,
            self.turn * self.side,
            (corner * self.turn + self.shift) * self.side,
        )
        pixels = np.array(photo)
        before = pixels[rows, columns]
        weight = self.weights(photo.size)
        weight = weight if before.ndim == 2 else weight[..., None]
        blend = np.rint(before * (1 - weight) + np.asarray(new) * weight).astype(np.uint8)
        pixels[rows, columns] = np.where(weight == 0, before, blend)
        return Image.fromarray(pixels)

    def weights(self, size: tuple[int, int]) -> np.ndarray:
        """Return how much of each pixel of a photo of (W, H) is new, 0 to 1, within the region's frame."""
        rows, columns = self._inside(size)
        if self.mask is not None:
            return self.mask[rows, columns]
        x, y = np.meshgrid(
            np.arange(columns.start, columns.stop) + 0.5, np.arange(rows.start, rows.stop) + 0.5
        )
        place = (x + 1j * y) * self.turn + self.shift
        outside = np.clip((self._radius(place.real, place.imag) - _FEATHER) / (1 - _FEATHER), 0, 1)
        return 1 - outside**2 * (3 - 2 * outside)

    def covers(self, size: tuple[int, int]) -> bool:
        """Whether any pixel of a photo of (W, H) would change."""
        rows, columns = self._inside(size)
        some = rows.stop > rows.start and columns.stop > columns.start
        return some and bool(self.weights(size).any())

    def _radius(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        centre_x, centre_y, radius_x, radius_y = self.ellipse
        return np.hypot((x - centre_x) / radius_x, (y - centre_y) / radius_y)

    def _frame(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the pixels that the square touches, and two more on each side."""
        corners = (np.array([0, 1, 1j, 1 + 1j]) - self.shift) / self.turn
        low = np.floor([corners.real.min(), corners.imag.min()]).astype(int) - 2
        high = np.ceil([corners.real.max(), corners.imag.max()]).astype(int) + 2
        return int(low[0]), int(low[1]), int(high[0]), int(high[1])

    def _inside(self, size: tuple[int, int]) -> tuple[slice, slice]:
        left, top, right, bottom = self._frame()
        return (
            slice(min(max(top, 0), size[1]), min(max(bottom, 0), size[1])),
            slice(min(max(left, 0), size[0]), min(max(right, 0), size[0])),
        )


def face_region(face: Face, alignment: Alignment, mask: np.ndarray | None = None) -> FaceRegion:
    """Return the region of a face, turned and placed as in the pictures that the model was trained on.

    Args:
        face: with landmarks it is turned upright; without, only its box is placed.
        alignment: of the model's training pictures.
        mask: (H, W) of the photo in [0, 1], what is to be changed, in place of an ellipse.
    """
    box = _box(face.box)
    left, top, right, bottom = (min(max(side, _RIM), 1 - _RIM) for side in alignment.box)
    wanted = _box((left, top, right, bottom))
    scale = min(wanted[1] / box[1], wanted[2] / box[2])
    if face.landmarks is None:
        ellipse = (wanted[0].real, wanted[0].imag, box[1] * scale, box[2] * scale)
        return FaceRegion(complex(scale), wanted[0] - box[0] * scale, ellipse, mask)
    points, places = (np.array(found) @ [1, 1j] for found in (face.landmarks, alignment.landmarks))
    middle, place = points.mean(), places.mean()
    # least squares over the five points: (points - middle) * turn ~ places - place
    turn = np.vdot(points - middle, places - place) / np.vdot(points - middle, points - middle).real
    turn *= min(1, scale * _CLOSEST / abs(turn))
    ellipse = (wanted[0].real, wanted[0].imag, wanted[1], wanted[2])
    return FaceRegion(complex(turn), complex(place - middle * turn), ellipse, mask)


def _box(box: Sequence[float]) -> tuple[complex, float, float]:
    """Return the centre of a box, and half of its width and height."""
    left, top, right, bottom = box
    return complex(left + right, top + bottom) / 2, (right - left) / 2, (bottom - top) / 2


def _mirrored(index: np.ndarray, side: int) -> np.ndarray:
    index = index % (2 * side)
    return np.where(index < side, index, 2 * side - 1 - index)


def _transformed(picture: Image.Image, size: tuple[int, int], factor: complex, start: complex) -> Image.Image:
    """Resample: the pixel at z = x + iy of the result is the one at z * factor + start of the picture."""
    rows = (factor.real, -factor.imag, start.real, factor.imag, factor.real, start.imag)
    return picture.transform(size, Image.Transform.AFFINE, rows, Image.Resampling.BICUBIC)
