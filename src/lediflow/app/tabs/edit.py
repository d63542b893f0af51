"""The tab *Edit*."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from lediflow.app import edit, uploads
from lediflow.app.components import LIGHT, WORK, painter, picture_file, picture_shown, told
from lediflow.app.limits import Limits
from lediflow.app.models import Models
from lediflow.app.session import Session
from lediflow.app.tabs.shared import cells, chosen, class_list, gallery, seed_of, told_of
from lediflow.errors import UserError

_PAINT = "#e5484d"


def build(models: Models, limits: Limits, state: gr.State) -> None:
    """Lay the tab out and connect it."""
    with gr.Tabs():
        with gr.Tab("Inpaint", id="inpaint"):
            _inpaint(models, limits, state)
        with gr.Tab("Restyle", id="restyle"):
            _restyle(models, limits, state)
        if models.learned is not None:
            with gr.Tab("Anonymize", id="anonymize"):
                _anonymize(models, limits, state)


def _inpaint(models: Models, limits: Limits, state: gr.State) -> None:
    gr.Markdown(
        "Choose a picture, paint over what is to be made anew, and press *Inpaint*. All other pixels stay as "
        "they are, bit for bit, at the picture's own size."
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280):
            picture = picture_file("Picture", "inpaint-picture")
            strength = gr.Slider(
                0, 1, 0.0, step=0.05, label="Change of z", visible=models.learned is not None,
                info="0: only details change, 1: anything may", elem_id="inpaint-strength",
            )  # fmt: skip
            hide = gr.Checkbox(True, label="Do not look under the paint", elem_id="inpaint-hide")
            feather = gr.Slider(0, 64, 0, step=1, label="Soften the edge, pixels", elem_id="inpaint-feather")
            count = gr.Slider(1, limits.variants, 4, step=1, label="Variants", elem_id="inpaint-count")
            seed = seed_of(0, "inpaint-seed")
            label = class_list(models, "inpaint-class")
            with gr.Accordion("A mask from a file, and the painted one to save", open=False):
                mask_file = picture_file("Mask: white is made anew", "inpaint-mask", 120)
                save = gr.Button("Save what is painted as a mask", elem_id="inpaint-save")
                saved = gr.DownloadButton("Download the mask", interactive=False, elem_id="inpaint-saved")
        with gr.Column(scale=3, min_width=280):
            canvas = painter("Paint here", "inpaint-painter", _PAINT, uploads.LEAST_SHOWN)
            with gr.Row():
                start = gr.Button("Inpaint", variant="primary", elem_id="inpaint-start")
                stop = gr.Button("Stop", variant="stop", elem_id="inpaint-stop")
            status = gr.Markdown(elem_id="inpaint-status")
            made = gallery("Inpainted", "inpaint-made", columns=4)

    def show(path: str | None) -> Any:
        if path is None:
            return None
        shown = uploads.to_paint_on(uploads.open_upload(path, limits))
        return {"background": shown, "layers": [], "composite": None}

    def mask_of(path: str | None, painted: Any, mask_path: str | None) -> Image.Image:
        size = uploads.open_upload(path, limits).size
        if not mask_path:
            return uploads.painted_mask(painted, size)
        mask = uploads.open_upload(mask_path, limits)
        if mask.size != size:
            raise UserError(
                f"the mask is {mask.width} x {mask.height} pixels and the picture {size[0]} x {size[1]}; "
                "give a mask of the picture's size"
            )
        return mask

    def run(
        session: Session, path: Any, painted: Any, mask_path: Any, strength: float, hide: bool, feather: int,
        count: int, seed: Any, name: Any,
    ) -> Any:  # fmt: skip
        mask = mask_of(path, painted, mask_path)
        edited = edit.inpaint(
            models, session, limits, path, mask, strength=strength, hide=hide, feather=feather, count=count,
            seed=seed, class_name=chosen(name),
        )  # fmt: skip
        return cells(edited.made), told_of(edited)

    def save_mask(session: Session, path: Any, painted: Any) -> Any:
        kept = session.keep(mask_of(path, painted, None), None, "a mask")
        return gr.DownloadButton(value=str(kept.path), interactive=True)

    picture.change(told(show), picture, canvas, show_progress="minimal", **LIGHT)
    running = start.click(
        told(run),
        [state, picture, canvas, mask_file, strength, hide, feather, count, seed, label],
        [made, status],
        show_progress_on=[status],
        **WORK,
    )
    stop.click(None, cancels=[running], api_visibility="private")
    save.click(told(save_mask), [state, picture, canvas], saved, show_progress="hidden", **LIGHT)


def _restyle(models: Models, limits: Limits, state: gr.State) -> None:
    gr.Markdown(
        "Give a sketch or a collage: the model makes pictures of its own kind of it (SDEdit). Strength 0 "
        "leaves it as it is, 1 leaves nothing of it."
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280):
            picture = picture_file("Picture", "restyle-picture")
            strength = gr.Slider(0, 1, 0.6, step=0.05, label="Strength", elem_id="restyle-strength")
            count = gr.Slider(1, limits.variants, 4, step=1, label="Variants", elem_id="restyle-count")
            seed = seed_of(0, "restyle-seed")
            label = class_list(models, "restyle-class")
            with gr.Row():
                start = gr.Button("Restyle", variant="primary", elem_id="restyle-start")
                stop = gr.Button("Stop", variant="stop", elem_id="restyle-stop")
        with gr.Column(scale=3, min_width=280):
            made = gallery("Restyled", "restyle-made", columns=4)
            status = gr.Markdown(elem_id="restyle-status")

    def run(session: Session, path: Any, strength: float, count: int, seed: Any, name: Any) -> Any:
        edited = edit.restyle(
            models, session, limits, path, strength=strength, count=count, seed=seed, class_name=chosen(name)
        )
        return cells(edited.made), told_of(edited)

    running = start.click(
        told(run), [state, picture, strength, count, seed, label], [made, status],
        show_progress_on=[status], **WORK,
    )  # fmt: skip
    stop.click(None, cancels=[running], api_visibility="private")


def _anonymize(models: Models, limits: Limits, state: gr.State) -> None:
    gr.Markdown(
        "Put made-up faces in place of those in a photo. The model must have been trained on faces. No "
        "detector finds every face: look at the result before you hand it on."
    )
    reason = edit.no_detector()
    if reason is not None:
        gr.Markdown(f"Faces cannot be found here: {reason}.", elem_id="anonymize-missing")
        return
    found = gr.State(list)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280):
            picture = picture_file("Picture", "anonymize-picture")
            boxes = gr.CheckboxGroup([], label="Faces that are replaced", elem_id="anonymize-faces")
            strength = gr.Slider(0, 1, 1.0, step=0.05, label="Strength", elem_id="anonymize-strength")
            label = class_list(models, "anonymize-class")
            with gr.Row():
                start = gr.Button("Replace the faces", variant="primary", elem_id="anonymize-start")
                stop = gr.Button("Stop", variant="stop", elem_id="anonymize-stop")
        with gr.Column(scale=3, min_width=280):
            framed = gr.AnnotatedImage(label="Found", format="png", height=320, elem_id="anonymize-found")
            status = gr.Markdown(elem_id="anonymize-status")
            made = gallery("Without the old faces", "anonymize-made", columns=1)

    def framed_of(path: str | None, faces: list[Any], on: list[str]) -> Any:
        if not path:
            return None
        photo = edit.bare(uploads.open_upload(path, limits)).convert("RGB")
        named = zip(faces, edit.face_names(faces), strict=True)
        inside = [(edit.box_inside(face, photo.size), name) for face, name in named if name in on]
        return picture_shown(photo), inside

    def find(path: str | None) -> Any:
        if path is None:
            return [], gr.CheckboxGroup(choices=[], value=[]), None, ""
        _, faces = edit.find_faces(limits, path)
        names = edit.face_names(faces)
        sentence = f"{len(faces)} faces found; switch off those that stay." if faces else "No face was found."
        return faces, gr.CheckboxGroup(choices=names, value=names), framed_of(path, faces, names), sentence

    def run(session: Session, path: Any, faces: list[Any], on: list[str], strength: float, name: Any) -> Any:
        edited = edit.anonymize(
            models, session, limits, path, faces, on, strength=strength, class_name=chosen(name)
        )
        return cells(edited.made), told_of(edited)

    picture.change(
        told(find), picture, [found, boxes, framed, status], show_progress="minimal",
        show_progress_on=[status], **WORK,
    )  # fmt: skip
    boxes.input(told(framed_of), [picture, found, boxes], framed, show_progress="hidden", **LIGHT)
    running = start.click(
        told(run), [state, picture, found, boxes, strength, label], [made, status],
        show_progress_on=[status], **WORK,
    )  # fmt: skip
    stop.click(None, cancels=[running], api_visibility="private")
