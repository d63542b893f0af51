"""The page: its tabs, its look, and its queue."""

from __future__ import annotations

import html
from pathlib import Path

import gradio as gr

from lediflow.app.limits import Limits
from lediflow.app.models import Models
from lediflow.app.session import Session
from lediflow.app.tabs import create, edit, explore, inside, upsample

_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # of the visitor's system
_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container { max-width: 1180px !important; width: 100% !important; margin: 0 auto !important; }
.crisp img { image-rendering: pixelated; }
#explore-picture img { width: 100%; height: 100%; object-fit: contain; }
.crisp .grid-wrap { max-height: none !important; min-height: 0 !important; }
.crisp .caption-label { font-size: 11px; padding: 1px 6px; opacity: 0.85; }
#head { padding: 4px 2px 0; }
#head h1 { font-size: 1.5rem; margin: 0; letter-spacing: -0.01em; }
#head p { margin: 2px 0 0; color: var(--body-text-color-subdued); }
:focus-visible { outline: 2px solid var(--primary-500) !important; outline-offset: 2px; }
.seed-row { align-items: end; }
footer { display: none !important; }
@media (max-width: 640px) {
  .gradio-container, .gradio-container > main { padding: 8px !important; }
  .crisp .grid-container { grid-template-columns: repeat(3, 1fr) !important; }
  button.lg { min-height: 44px; }
}
"""


def theme() -> gr.themes.Base:
    """Return the look; all its fonts are on the visitor's machine."""
    return gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", radius_size="md", font=_FONT, font_mono=_MONO
    ).set(
        block_border_width="1px",
        block_shadow="none",
        block_shadow_dark="none",
        block_title_background_fill="none",
        block_title_background_fill_dark="none",
        block_title_padding="0",
        block_title_text_color="*neutral_600",
        block_title_text_color_dark="*neutral_300",
        block_title_text_weight="600",
        block_label_background_fill="*neutral_100",
        block_label_background_fill_dark="*neutral_700",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_200",
        body_background_fill="*neutral_50",
    )


def page(models: Models, limits: Limits, home: Path) -> gr.Blocks:
    """Assemble the page.

    Args:
        models: what it works with.
        limits: for each visitor.
        home: folder for the sessions' pictures.
    """
    with gr.Blocks(
        title=f"lediflow: {Path(models.name).name}",
        analytics_enabled=False,
        delete_cache=(600, limits.idle_seconds),
    ) as blocks:
        # it is forgotten, and its pictures with it, an hour after the visitor has closed the page
        state = gr.State(Session(home, limits.kept), delete_callback=Session.close)
        gr.HTML(f"<h1>lediflow</h1><p>{_about(models)}</p>", elem_id="head", container=False, padding=False)
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Create", id="create"):
                create.build(models, limits, state)
            if models.learned is not None:
                with gr.Tab("Explore", id="explore") as tab:
                    explore.build(models, limits, state, tab)
            with gr.Tab("Edit", id="edit"):
                edit.build(models, limits, state)
            if models.upsampler is not None:
                with gr.Tab("Upsample", id="upsample"):
                    upsample.build(models, limits, state)
            if models.learned is not None:
                with gr.Tab("Inside", id="inside"):
                    inside.build(models, limits)
    blocks.queue(max_size=limits.queue, default_concurrency_limit=1, api_open=False)
    return blocks


def _about(models: Models) -> str:
    _, height, width = models.pipeline.picture_shape()
    kind = "LeDiFlow" if models.learned is not None else "flow matching"
    name = html.escape(Path(models.name).name)
    return f"Model <b>{name}</b>, {kind}, {width} x {height} pixels, on {models.pipeline.device.type}."
