"""What the tabs use of Gradio: pictures that stay files, paint as it is, errors as sentences."""

from __future__ import annotations

import functools
import hashlib
import html
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs, EditorDataBlobs
from gradio.utils import get_upload_folder
from PIL import Image

from lediflow.data.opening import BrokenImageError
from lediflow.errors import UserError
from lediflow.files import explained, written_whole
from lediflow.pipelines.photos import listed_photo

# Work with the model waits in one queue; what must answer at once, while a slider moves, in another; and what
# takes no time waits for neither.
WORK: dict[str, Any] = {"concurrency_id": "work", "concurrency_limit": 1, "api_visibility": "private"}
QUICK: dict[str, Any] = {"concurrency_id": "quick", "concurrency_limit": 1, "api_visibility": "private"}
LIGHT: dict[str, Any] = {"concurrency_id": "light", "concurrency_limit": 4, "api_visibility": "private"}
_MOST_PAINTED = 64  # pictures that were painted on and not yet used, of all visitors


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what answers an event: a user's mistake is shown in the page as a sentence."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def stream(*arguments: Any, **named: Any) -> Any:
            try:
                yield from function(*arguments, **named)
            except UserError as error:
                raise _shown(error) from None

        return stream

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except UserError as error:
            raise _shown(error) from None

    return call


def picture_file(label: str, name: str, height: int = 220) -> gr.Image:
    """Return a place for a picture, which gives functions the path of its file, unopened."""
    picture = gr.Image(label=label, sources=["upload", "clipboard"], height=height, elem_id=name, buttons=[])
    # a subclass would do, but of each Gradio writes a stub beside its source
    picture.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return picture


def picture_shown(image: Image.Image) -> str:
    """Write a picture for the page and return its path.

    Gradio would name it by its content too, and write it again in place for every visitor who sees the same
    one, which cuts short what another is just being sent.

    Raises:
        UserError: the disk is full.
    """
    content = hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()
    path = Path(get_upload_folder()) / content / "picture.png"
    with explained(path):
        if path.exists():
            path.touch()  # those that nobody saw for long are removed
        else:
            with written_whole(path) as unfinished:
                image.save(unfinished)
    return str(path)


def painter(label: str, name: str, colour: str, side: int) -> gr.ImageEditor:
    """Return a place to paint, which gives functions {"layers": [bytes or None]}, unopened.

    Args:
        label: of it.
        name: its id in the page.
        colour: of the paint.
        side: of the canvas while it is empty, pixels.
    """
    editor = gr.ImageEditor(
        label=label,
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=24, colors=[colour], default_color=colour, color_mode="fixed"),
        eraser=gr.Eraser(default_size=32),
        canvas_size=(side, side),
        height=460,
        format="png",
        elem_id=name,
        buttons=[],
    )
    blobs: dict[str, EditorDataBlobs] = {}

    def preprocess(payload: Any) -> Any:
        if payload is None:
            return None
        found = payload if payload.id is None else blobs.pop(payload.id, None)
        layers = [] if found is None else found.layers or []
        return {"layers": [_bytes_of(layer) for layer in layers[:1]]}

    @server
    def accept_blobs(data: AcceptBlobs) -> None:
        """Take what the browser sends before an event: one layer of paint, and not of ever more visitors."""
        name, index = str(data.data.get("id")), data.data.get("index")
        held = blobs.pop(name, None) or EditorDataBlobs(background=None, layers=[], composite=None)
        # only the first layer is looked at; what else is sent is not held
        if data.data.get("type") == "layer" and str(index) == "0" and data.files:
            held.layers[:] = [data.files[0][1]]
        blobs[name] = held
        while len(blobs) > _MOST_PAINTED:
            blobs.pop(next(iter(blobs)))

    editor.preprocess, editor.accept_blobs = preprocess, accept_blobs  # type: ignore[method-assign]
    return editor


def _shown(error: UserError) -> gr.Error:
    sentence = html.escape(str(error))
    sentence = sentence[:1].upper() + sentence[1:]
    end = "" if sentence[-1:] in ".!?" else "."
    return gr.Error(sentence + end, title="Not possible", print_exception=False)


def _bytes_of(layer: Any) -> bytes | None:
    if layer is None or isinstance(layer, bytes):
        return layer
    try:
        with listed_photo(Path(layer.path)) as file:
            return file.read()
    except (OSError, BrokenImageError):
        return None
