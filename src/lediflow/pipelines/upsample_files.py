"""Enlarge the pictures of files and folders, one after the other; a broken one does not stop the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lediflow.data.decode import read_picture, short_side
from lediflow.data.folders import visible_files
from lediflow.data.opening import BrokenImage, BrokenImageError, Home, picture_suffixes, row_path
from lediflow.errors import UserError
from lediflow.files import claim_folder, explained, quoted, shown, written_whole
from lediflow.pipelines.codec import mean_nfe
from lediflow.pipelines.upsample import FlowUpsamplePipeline
from lediflow.sources import derive_seed


@dataclass
class Upsampled:
    """What `upsample_files` did.

    Attributes:
        made: name, below the output folder, and (width, height) of each image that was made.
        found: how many were there already.
        broken: files that could not be enlarged, and why.
        seconds: taken to make them.
        nfe: evaluations of each network for one image.
    """

    made: dict[str, tuple[int, int]] = field(default_factory=dict)
    found: int = 0
    broken: list[BrokenImage] = field(default_factory=list)
    seconds: float = 0.0
    nfe: dict[str, float] = field(default_factory=dict)


def picture_files(sources: Sequence[Path]) -> dict[str, Path]:
    """Return the pictures in files and folders: for each the name of its result, a PNG below the output.

    Raises:
        UserError: there is no such file or folder, or no picture in it.
    """
    found: list[tuple[Path, Path]] = []  # name below the output, and file
    for source in sources:
        if source.is_dir():
            files = [f for f in visible_files(source) if f.suffix.lower() in picture_suffixes()]
            if not files:
                raise UserError(f"no pictures in {quoted(source)}")
            found += [(file.relative_to(source), file) for file in files]
        elif source.exists():
            found.append((Path(source.name), source))
        else:
            raise UserError(f"no file or folder {quoted(source)}")
    names: dict[str, Path] = {}
    for name, file in found:
        plain = str(name.with_suffix(".png"))
        # a.png beside a.jpg, or one name in two folders
        chosen = plain if plain not in names else f"{name}.png"
        number = 2
        while chosen in names:
            chosen, number = f"{name}-{number}.png", number + 1
        names[chosen] = file
    return names


def upsample_files(
    pipeline: FlowUpsamplePipeline,
    pictures: Mapping[str, Path],
    output: Path,
    *,
    request: Mapping[str, Any],
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Upsampled:
    """Enlarge pictures and write each as soon as it is made.

    What a picture becomes depends on the seed and its name, not on the others.

    Args:
        pipeline: that enlarges.
        pictures: as `picture_files` gives them.
        output: folder; images of the same request that are there already are kept.
        request: all that decides what an image looks like; plain values for JSON.
        overwrite: remove images of another request that are in the way.
        progress: called with the numbers of pictures done and to do.
        seed: of all.
        dtype: as for the pipeline's call.
        options: further ones of that, as `FlowUpsamplePipeline.settled` takes them.

    Raises:
        UserError: an impossible request, images of another one in the way, or the folder cannot be written.
    """
    pipeline.settled(**options)
    pipeline.need_codec()
    targets = {name: output / name for name in pictures}
    claim_folder(
        output,
        request,
        lambda _: [path for path in targets.values() if path.is_file()],
        called="images",
        overwrite=overwrite,
    )
    missing = [name for name in pictures if not targets[name].is_file()]
    done, evaluations = Upsampled(found=len(pictures) - len(missing)), []
    for count, name in enumerate(missing, done.found + 1):
        began = time.perf_counter()
        try:
            picture = _read(pictures[name], pipeline.image_channels)
            # an index of its own, whichever pictures stand beside it
            out = pipeline(picture, seed=seed, first_image=derive_seed(0, name), dtype=dtype, **options)
        except (BrokenImageError, UserError) as error:
            done.broken.append(BrokenImage(shown(pictures[name]), str(error)))
        else:
            (image,) = out.images
            with explained(targets[name]), written_whole(targets[name]) as unfinished:
                image.save(unfinished)
            done.made[name] = image.size
            done.seconds += time.perf_counter() - began
            evaluations.append((1, out.nfe))
        progress(count, len(pictures))
    done.nfe = mean_nfe(evaluations)
    return done


def _read(file: Path, channels: int) -> Image.Image:
    record, home = {"bytes": None, "path": row_path(file.absolute())}, Home(listed=True)
    # all of its pixels: none are to be lost before it is enlarged
    side = max(1, short_side(record, home))
    return read_picture(record, channels=1 if channels == 1 else 3, image_size=side, home=home)
