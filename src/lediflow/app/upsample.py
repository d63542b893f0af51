"""*Upsample*: a picture enlarged by a model that was trained for that."""

from __future__ import annotations

import time

from lediflow.app.edit import Edited
from lediflow.app.limits import Limits
from lediflow.app.models import Models
from lediflow.app.session import Session
from lediflow.app.uploads import open_upload
from lediflow.errors import UserError

_TILE = 512  # pixels of the result that are made at once, where it is larger


def enlarge(
    models: Models, session: Session, limits: Limits, picture: str | None, *, steps: int, seed: int
) -> Edited:
    """Enlarge an uploaded picture.

    Raises:
        UserError: it cannot be used, what comes out would be too large, or there is no upsampler.
    """
    upsampler = models.upsampler
    if upsampler is None:
        raise UserError("this page was started without a model that enlarges; start it with --upsampler")
    photo = open_upload(picture, limits)
    scale = upsampler.config.scale
    width, height = photo.width * scale, photo.height * scale
    if width * height > limits.made_pixels:
        raise UserError(
            f"the result would be {width:,} x {height:,} pixels, and at most "
            f"{limits.made_pixels / 1e6:,.0f} million are allowed here; give a smaller picture"
        )
    began = time.perf_counter()
    out = upsampler(
        photo,
        limits.whole("steps", steps, limits.steps),
        seed=limits.seed(seed),
        tile_size=_TILE if max(width, height) > _TILE else None,
        dtype=models.precision,
    )
    seconds = time.perf_counter() - began
    kept = [session.keep(image, None, f"{width} x {height}") for image in out.images]
    return Edited(kept, out.nfe, seconds)
