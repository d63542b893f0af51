"""What several tabs share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from lediflow.app.create import evaluations
from lediflow.app.edit import Edited
from lediflow.app.limits import MOST_SEED
from lediflow.app.models import Models
from lediflow.app.session import Kept

ANY = "any"  # no choice of a class or cluster


def chosen(value: Any) -> Any:
    """Return what a list was set to, None for no choice."""
    return None if value in (None, "", ANY) else value


def cells(pictures: Sequence[Kept]) -> list[tuple[str, str]]:
    """Return pictures as a gallery takes them: paths with captions, without those that were forgotten."""
    return [(str(one.path), one.caption) for one in pictures if one.path.exists()]


def gallery(label: str, name: str, columns: int, *, preview: bool = True) -> gr.Gallery:
    """Return a gallery of pictures that can be downloaded as they are, with what is written in them.

    Args:
        label: of it.
        name: its id in the page.
        columns: of pictures.
        preview: whether one that is clicked is shown large.
    """
    return gr.Gallery(
        label=label,
        show_label=False,
        columns=columns,
        fit_columns=False,
        allow_preview=preview,
        object_fit="contain",
        height="auto",
        interactive=False,
        format="png",
        buttons=["download", "fullscreen"],
        elem_id=name,
        elem_classes="crisp",
    )


def class_list(models: Models, name: str) -> gr.Dropdown:
    """Return the list of classes; hidden for a model without."""
    return gr.Dropdown(
        [ANY, *models.classes], value=ANY, label="Class", visible=bool(models.classes), elem_id=name
    )


def seed_of(value: int, name: str, label: str = "Seed") -> gr.Number:
    """Return a field for a seed."""
    return gr.Number(
        value, label=label, precision=0, minimum=0, maximum=MOST_SEED, elem_id=name, min_width=110
    )


def told_of(edited: Edited) -> str:
    """Return how long an edit took, and its evaluations."""
    return f"{edited.seconds:.2f} s. {evaluations(edited.nfe)}"
