"""What a PNG of ours says of itself: which model made it, of what, with which settings; and made again by it.

A `Recipe` is what the commands make images by, and what `lediflow sample --again` reads back: one way for
both, so the images are the same bit for bit on the same kind of device.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lediflow import __version__
from lediflow.data.opening import BrokenImageError, opened
from lediflow.devices import DTYPES
from lediflow.errors import UserError
from lediflow.files import quoted, shown
from lediflow.pipelines.base import ImagePipeline
from lediflow.pipelines.codec import PipelineOutput
from lediflow.pipelines.photos import listed_photo, open_photo

CHUNK = "lediflow"  # the PNG text chunk that holds a recipe as JSON
TOOLS = ("reconstruct", "interpolate", "vary", "inpaint", "restyle", "anonymize")  # pipelines' methods
_OPTIONS = {"num_images": "-n", "class_labels": "--class", "mask_image": "--mask"}
_MOST_TEXT = 2**20


@dataclass(frozen=True)
class Recipe:
    """All that decides what an image looks like; plain values for JSON.

    Attributes:
        tool: "sample" for a request of new images, or one of `TOOLS`.
        model: as the user named it.
        weights: digest of the model's weights.
        settings: arguments of the pipeline's call or of its method; dtype by name.
        inputs: what was edited, in order: {"path", "sha256"} of a file, or {"seed"}.
        mask: the mask's file likewise, or {"path": "alpha"}; None for none.
        image: which of the images that come out.
        version: of lediflow.
    """

    tool: str
    model: str
    weights: str
    settings: Mapping[str, Any]
    inputs: tuple[Mapping[str, Any], ...] = ()
    mask: Mapping[str, Any] | None = None
    image: int = 0
    version: str = field(default=__version__)

    def of(self, image: int, **settings: Any) -> Recipe:
        """Return the recipe of one of its images, with some settings set."""
        return replace(self, image=image, settings={**self.settings, **settings})

    def command(self) -> str:
        """Return the command that makes all images of this recipe; they go to its --output."""
        parts = ["lediflow", self.tool, self.model]
        parts += [str(one["path"]) for one in self.inputs if "path" in one]
        seeds = [str(one["seed"]) for one in self.inputs if "seed" in one]
        parts += ["--seeds", ",".join(seeds)] if seeds else []
        parts += ["--mask", str(self.mask["path"])] if self.mask else []
        for name, value in self.settings.items():
            option = _OPTIONS.get(name, f"--{name.replace('_', '-')}")
            if value is True:
                parts.append(option)
            elif value is not None and value is not False:
                values = value if isinstance(value, list | tuple) else [value]
                parts += [part for one in values for part in (option, str(one))]
        return shlex.join(parts)

    def png_text(self) -> PngInfo:
        """Return the text chunks of the image's PNG."""
        text = PngInfo()
        text.add_itxt("Software", f"lediflow {self.version}")
        text.add_itxt("command", shown(self.command()))
        text.add_itxt(CHUNK, json.dumps(asdict(self), sort_keys=True))
        return text

    def make(self, pipeline: ImagePipeline) -> PipelineOutput:
        """Make all images of this recipe, as PIL images.

        Raises:
            UserError: as the pipeline; the pipeline cannot do this; or an input is not what it was.
        """
        settings = dict(self.settings)
        settings["dtype"] = DTYPES[settings.get("dtype") or "fp32"]
        if self.tool == "sample":
            # a recipe without one is of a time when there was no other
            return pipeline(**{"temperature": 1.0, **settings})
        method = tool_of(pipeline, self.tool, self.model)
        if self.mask is not None:
            alpha = self.mask["path"] == "alpha"
            settings["mask_image"] = "alpha" if alpha else _reopened(self.mask)
        return method(*(one["seed"] if "seed" in one else _reopened(one) for one in self.inputs), **settings)


def tool_of(pipeline: ImagePipeline, tool: str, model: str) -> Any:
    """Return a pipeline's method for a tool.

    Raises:
        UserError: it has none, being plain flow matching.
    """
    if tool not in TOOLS or not hasattr(pipeline, tool):
        raise UserError(
            f"{model} is plain flow matching: it has no auxiliary model and so no latent z to {tool}; give a "
            "LeDiFlow model"
        )
    return getattr(pipeline, tool)


def file_input(path: Path) -> dict[str, Any]:
    """Return how a recipe names a file: its path as it was given, and a digest of its contents.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with listed_photo(path) as file:
            return {"path": str(path), "sha256": hashlib.sha256(file.read()).hexdigest()}
    except (OSError, BrokenImageError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {quoted(path)}: {reason}") from None


def read_recipe(path: Path) -> Recipe:
    """Read the recipe that a PNG holds.

    Raises:
        UserError: it is no PNG, or holds none that this version reads.
    """
    text = _chunk(path)
    if text is None:
        raise UserError(
            f"{quoted(path)} does not say how it was made: it is no PNG of lediflow, or was saved again by "
            "another program, which leaves that out"
        )
    try:
        values = json.loads(text)
        recipe = Recipe(**{**values, "inputs": tuple(values["inputs"])})
        whole = isinstance(recipe.image, int) and isinstance(recipe.settings, dict)
        if not whole or recipe.tool not in ("sample", *TOOLS):
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{quoted(path)} was made by another version of lediflow, or is damaged") from None
    return recipe


def _chunk(path: Path) -> str | None:
    try:
        with listed_photo(path) as file, opened({"bytes": file.read(), "path": None}) as (picture, _):
            if picture.format != "PNG":
                return None
            picture.load()  # chunks may stand behind the pixels
            text = getattr(picture, "text", {}).get(CHUNK)
    except (OSError, BrokenImageError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {quoted(path)}: {reason}") from None
    return text if text is None or len(text) <= _MOST_TEXT else None


def _reopened(one: Mapping[str, Any]) -> Image.Image:
    path = Path(one["path"])
    if file_input(path)["sha256"] != one["sha256"]:
        raise UserError(f"{quoted(path)} is not the file that it was: another picture is there now")
    return open_photo(path)
