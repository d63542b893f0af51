"""The tab *Inside*."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lediflow.app.components import WORK, picture_shown, told
from lediflow.app.inside import MOST_STEPS, inside
from lediflow.app.limits import Limits
from lediflow.app.models import Models
from lediflow.app.tabs.shared import chosen, class_list, gallery, seed_of


def build(models: Models, limits: Limits) -> None:
    """Lay the tab out and connect it."""
    gr.Markdown("Why few steps suffice: the flow starts near its end.")
    with gr.Row():
        seed = seed_of(0, "inside-seed")
        steps = gr.Slider(1, MOST_STEPS, 4, step=1, label="Steps", elem_id="inside-steps")
        label = class_list(models, "inside-class")
        start = gr.Button("Look inside", variant="primary", elem_id="inside-start")
    told_by = [
        "**z**: a small latent, drawn by the latent sampler, says what the picture will show.",
        "**The learned prior**: from z one evaluation decodes a mean mu and a spread sigma (white: "
        "uncertain); x is drawn from them.",
        "**The path from the prior**: the flow carries x, which is nearly a picture already, a short way.",
    ]
    shown = []
    for name, sentence in zip(("z", "prior", "path"), told_by, strict=True):
        gr.Markdown(sentence)
        shown.append(gallery("", f"inside-{name}", columns=6))
    if models.baseline is not None:
        gr.Markdown(
            "**The path of flow matching**: it starts at noise that knows nothing, far from any picture."
        )
        shown.append(gallery("", "inside-baseline", columns=6))
    status = gr.Markdown(elem_id="inside-status")

    def run(seed: Any, steps: int, name: Any) -> Any:
        found = inside(models, limits, seed=seed, steps=steps, class_name=chosen(name))
        rows = [found.z, found.prior, found.path, found.baseline]
        files = [[(picture_shown(image), name) for image, name in row] for row in rows[: len(shown)]]
        return *files, found.told

    start.click(told(run), [seed, steps, label], [*shown, status], show_progress_on=[status], **WORK)
