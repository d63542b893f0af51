"""The tab *Explore*."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lediflow.app import explore
from lediflow.app.components import LIGHT, QUICK, WORK, picture_file, picture_shown, told
from lediflow.app.create import evaluations, roll
from lediflow.app.limits import Limits
from lediflow.app.models import Models
from lediflow.app.session import Session
from lediflow.app.tabs.shared import chosen, class_list, gallery, seed_of


def build(models: Models, limits: Limits, state: gr.State, opened: gr.Tab) -> None:
    """Lay the tab out and connect it; `opened` is the tab, whose first picture comes when it is opened."""
    with gr.Tabs():
        with gr.Tab("Between two pictures", id="between"):
            _between(models, limits, state, opened)
        with gr.Tab("Variations", id="variations"):
            _variations(models, limits, state)


def _between(models: Models, limits: Limits, state: gr.State, opened: gr.Tab) -> None:
    gr.Markdown("Go from one picture to another. Each end is a seed, or a picture of your own.")
    way = gr.State(None)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280):
            with gr.Row():
                first = seed_of(1, "explore-first", "First seed")
                second = seed_of(2, "explore-second", "Second seed")
            label = class_list(models, "explore-class")
            with gr.Accordion("Pictures in place of the seeds", open=False), gr.Row():
                pictures = [
                    picture_file(name, f"explore-{name.lower()}", 150) for name in ("First", "Second")
                ]
            roll_both = gr.Button("⚄ Roll both", elem_id="explore-dice")
        with gr.Column(scale=3, min_width=280):
            picture = gr.Image(
                label="Between",
                interactive=False,
                format="png",
                height=360,
                elem_id="explore-picture",
                elem_classes="crisp",
                buttons=["fullscreen"],
            )
            slider = gr.Slider(0, explore.STOPS - 1, 50, step=1, label="From the first to the second, %",
                               elem_id="explore-slider", buttons=[])  # fmt: skip
            status = gr.Markdown(elem_id="explore-status")
            with gr.Row():
                keep = gr.Button("Keep this picture", elem_id="explore-keep")
                saved = gr.DownloadButton(
                    "Download with settings", interactive=False, elem_id="explore-download"
                )

    def shown(found: explore.Way, stop: float) -> Any:
        image, nfe, seconds = found.at(int(stop))
        return picture_shown(image), f"{1000 * seconds:.0f} ms. {evaluations(nfe)}"

    def prepare(seed_a: Any, seed_b: Any, path_a: Any, path_b: Any, name: Any, stop: float) -> Any:
        ends = (path_a or seed_a, path_b or seed_b)
        found = explore.way_between(models, limits, ends, chosen(name))
        return found, *shown(found, stop)

    inputs = [first, second, *pictures, label, slider]
    outputs = [way, picture, status]
    options: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}

    def move(found: explore.Way | None, *given: Any) -> Any:
        return prepare(*given) if found is None else (found, *shown(found, given[-1]))

    def first_one(found: explore.Way | None, *given: Any) -> Any:
        return prepare(*given) if found is None else gr.skip()

    for changed in (first, second, label):
        changed.change(told(prepare), inputs, outputs, **options, **QUICK)
    for given in pictures:
        given.change(told(prepare), inputs, outputs, **options, **QUICK)
    # an answer may come after that of a slider that was moved meanwhile, and would bring the old place back
    opened.select(told(first_one), [way, *inputs], outputs, **options, **QUICK)
    slider.input(told(move), [way, *inputs], outputs, **options, **QUICK)
    roll_both.click(lambda: (roll(), roll()), None, [first, second], show_progress="hidden", **LIGHT)

    def save(session: Session, found: explore.Way | None, stop: float, *given: Any) -> Any:
        found = found or prepare(*given)[0]
        kept = session.keep(found.at(int(stop))[0], found.recipe(int(stop)), f"{int(stop)} % of the way")
        return gr.DownloadButton(value=str(kept.path), interactive=True)

    keep.click(told(save), [state, way, slider, *inputs], saved, show_progress="hidden", **QUICK)


def _variations(models: Models, limits: Limits, state: gr.State) -> None:
    gr.Markdown(
        "Eight variations lie around the picture in the middle. Click one to make it the centre; a small "
        "distance keeps close, a large one goes far."
    )
    centre, around, turn = gr.State(None), gr.State(list), gr.State(0)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280):
            seed = seed_of(1, "vary-seed", "Seed of the first centre")
            label = class_list(models, "vary-class")
            strength = gr.Slider(0, 1, 0.5, step=0.05, label="Distance", elem_id="vary-strength")
            picture = picture_file("Or a picture of your own", "vary-picture", 150)
            with gr.Row():
                start = gr.Button("Start anew", variant="primary", elem_id="vary-start")
                again = gr.Button("Others around this centre", elem_id="vary-again")
        with gr.Column(scale=3, min_width=280):
            grid = gallery("Variations", "vary-grid", columns=3, preview=False)
            status = gr.Markdown(elem_id="vary-status")

    def around_of(session: Session, path: str, seed: int, strength: float, name: Any) -> Any:
        kept, nfe, seconds = explore.vary(
            models, session, limits, path, strength=strength, seed=seed, class_name=chosen(name)
        )
        shown = explore.centred(path, kept)
        return (
            gr.Gallery(value=shown, selected_index=None),
            path,
            kept,
            seed,
            f"{seconds:.2f} s. {evaluations(nfe)}",
        )

    def begin(session: Session, seed: Any, path: Any, strength: float, name: Any) -> Any:
        if not path:
            path = explore.first_picture(models, session, limits, seed, chosen(name))
        return around_of(session, path, 0, strength, name)

    def others(session: Session, path: Any, turn: int, strength: float, name: Any, *first: Any) -> Any:
        if path is None:
            seed, picture = first
            return begin(session, seed, picture, strength, name)
        return around_of(session, path, turn + 1, strength, name)

    def choose(
        session: Session,
        kept: list[Any],
        path: Any,
        turn: int,
        strength: float,
        name: Any,
        event: gr.SelectData,
    ) -> Any:
        cell = event.index
        middle = explore.AROUND // 2
        if not isinstance(cell, int) or cell == middle or not 0 <= cell <= explore.AROUND or not kept:
            return gr.skip(), path, kept, turn, gr.skip()
        return around_of(session, str(kept[cell - (cell > middle)].path), turn + 1, strength, name)

    outputs = [grid, centre, around, turn, status]
    start.click(
        told(begin), [state, seed, picture, strength, label], outputs, show_progress_on=[status], **WORK
    )
    again.click(
        told(others), [state, centre, turn, strength, label, seed, picture], outputs,
        show_progress_on=[status], **WORK,
    )  # fmt: skip
    grid.select(
        told(choose),
        [state, around, centre, turn, strength, label],
        outputs,
        show_progress_on=[status],
        **WORK,
    )
