"""Write the images of a request to a folder, batch by batch, so that one that was cut off resumes.

DIR/000000.png ...  image i of the request, each written whole
DIR/grid.png        the first of them together
DIR/request.json    what was asked for; another request is not mixed in (`files.claim_folder`)
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lediflow.errors import UserError
from lediflow.files import explained, written_whole
from lediflow.pictures import image_grid, to_float, to_pil
from lediflow.pipelines.base import ImagePipeline
from lediflow.pipelines.codec import mean_nfe
from lediflow.pipelines.recipes import Recipe
from lediflow.progress import Progress

GRID_IMAGES = 256
_IMAGE = re.compile(r"\d{6,}\.png")


@dataclass
class Saved:
    """What `save_images` did.

    Attributes:
        made: images made now, in this process.
        found: images that were there already.
        seconds: taken to make them.
        nfe: evaluations of each network for one image; empty where all were there.
    """

    made: int = 0
    found: int = 0
    seconds: float = 0.0
    nfe: dict[str, float] = field(default_factory=dict)


def saved_images(output: Path) -> Iterator[Path]:
    """The images of a request in its folder, and their grid."""
    for path in output.iterdir():
        if _IMAGE.fullmatch(path.name) or path.name == "grid.png":
            yield path


def batches_of_process(count: int, batch_size: int, process: int = 0, processes: int = 1) -> list[range]:
    """Return which of `count` images this process makes: every `processes`-th batch.

    Where there is enough work the batches are those that one process would make, so the images are the same
    bit for bit on the same kind of device.

    Raises:
        UserError: `count` or `batch_size` is below 1.
    """
    for name, value in (("num_images", count), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    size = min(batch_size, -(-count // processes))
    return [range(i, min(i + size, count)) for i in range(process * size, count, processes * size)]


def save_images(
    pipeline: ImagePipeline,
    output: Path,
    batches: list[range],
    *,
    first_image: int = 0,
    silent: bool = False,
    recipe: Recipe | None = None,
    **options: Any,
) -> Saved:
    """Make the batches that are not in `output` yet, and write each as soon as it is made.

    Args:
        pipeline: makes the images.
        output: folder, claimed for this request.
        batches: of images, by their number in the request, from 0.
        first_image: index of number 0.
        silent: show no progress.
        recipe: of the request, for the text in the PNG files; None for none.
        options: of the pipeline's call.

    Raises:
        UserError: what the pipeline refuses, or the folder cannot be written.
    """
    done = Saved()
    total = sum(len(batch) for batch in batches)

    def complete(batch: range) -> bool:
        return all(image_path(output, first_image + i).is_file() for i in batch)

    missing = [batch for batch in batches if not complete(batch)]
    evaluations: list[tuple[int, dict[str, float]]] = []
    done.found = total - sum(len(batch) for batch in missing)
    with Progress("images", done.found, total, silent=silent or not missing) as progress:
        for batch in missing:
            began = time.perf_counter()
            out = pipeline(
                len(batch),
                first_image=first_image + batch.start,
                batch_size=max(1, len(batch)),
                output_type="pt",
                **options,
            )
            done.seconds += time.perf_counter() - began
            evaluations.append((len(batch), out.nfe))
            done.made += len(batch)
            # the whole batch: an image alone may differ from it in the last bit
            part = {"num_images": len(batch), "first_image": first_image + batch.start}
            for k, image in enumerate(to_pil(out.images)):
                path = image_path(output, first_image + batch[k])
                text = None
                if recipe is not None:
                    text = recipe.of(k, **part, batch_size=len(batch)).png_text()
                with explained(path), written_whole(path) as unfinished:
                    image.save(unfinished, pnginfo=text)
            progress.update(done.found + done.made)
    done.nfe = mean_nfe(evaluations)
    return done


def image_path(output: Path, index: int) -> Path:
    """Return the file of image `index`."""
    return output / f"{index:06d}.png"


def save_grid(output: Path, indices: range) -> int:
    """Write grid.png of the first images of a request that is complete; return how many it shows."""
    shown = indices[:GRID_IMAGES]
    images = []
    for i in shown:
        with Image.open(image_path(output, i), formats=["PNG"]) as picture:
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            images.append(pixels.view(picture.height, picture.width, -1).movedim(-1, 0))
    grid = image_grid(to_float(torch.stack(images)), scale=max(1, 64 // images[0].shape[-1]))
    path = output / "grid.png"
    with explained(path), written_whole(path) as unfinished:
        grid.save(unfinished)
    return len(shown)
