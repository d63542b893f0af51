"""The tab *Upsample*."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lediflow.app import upsample
from lediflow.app.components import WORK, picture_file, told
from lediflow.app.limits import Limits
from lediflow.app.models import Models
from lediflow.app.session import Session
from lediflow.app.tabs.shared import cells, gallery, seed_of, told_of


def build(models: Models, limits: Limits, state: gr.State) -> None:
    """Lay the tab out and connect it."""
    assert models.upsampler is not None, "the tab is there only with an upsampler"
    settled = models.upsampler.settle()
    gr.Markdown(f"Enlarge a picture {models.upsampler.config.scale} times along each side.")
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280):
            picture = picture_file("Picture", "upsample-picture")
            steps = gr.Slider(
                1, limits.steps, settled["steps"], step=1, label="Steps", elem_id="upsample-steps"
            )
            seed = seed_of(0, "upsample-seed")
            with gr.Row():
                start = gr.Button("Enlarge", variant="primary", elem_id="upsample-start")
                stop = gr.Button("Stop", variant="stop", elem_id="upsample-stop")
        with gr.Column(scale=3, min_width=280):
            made = gallery("Enlarged", "upsample-made", columns=1)
            status = gr.Markdown(elem_id="upsample-status")

    def run(session: Session, path: Any, steps: int, seed: Any) -> Any:
        edited = upsample.enlarge(models, session, limits, path, steps=steps, seed=seed)
        return cells(edited.made), told_of(edited)

    running = start.click(
        told(run), [state, picture, steps, seed], [made, status], show_progress_on=[status], **WORK
    )
    stop.click(None, cancels=[running], api_visibility="private")
