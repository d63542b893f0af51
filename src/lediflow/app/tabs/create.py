"""The tab *Create*."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lediflow.app import create
from lediflow.app.components import LIGHT, WORK, told
from lediflow.app.limits import Limits
from lediflow.app.models import Models
from lediflow.app.session import Session
from lediflow.app.tabs.shared import ANY, cells, chosen, seed_of
from lediflow.app.tabs.shared import gallery as gallery_of
from lediflow.app.uploads import open_upload

_STRENGTHS = {
    "guidance": "Guidance of the flow",
    "latent_guidance": "Guidance of the latent sampler",
    "autoguidance": "Autoguidance of the flow",
    "latent_autoguidance": "Autoguidance of the latent sampler",
    "temperature": "Temperature of the source",
}


def build(models: Models, limits: Limits, state: gr.State) -> None:
    """Lay the tab out and connect it."""
    shown = gr.State(list)  # pictures of the gallery, which the browser gives back as addresses only
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280):
            asked = _controls(models, limits)
            with gr.Row():
                start = gr.Button("Create", variant="primary", elem_id="create-start")
                stop = gr.Button("Stop", variant="stop", elem_id="create-stop")
            with gr.Accordion("Restore from a picture", open=False, elem_id="create-restore-box"):
                gr.Markdown("Drop a PNG that was made here: all its settings come back, and the picture.")
                dropped = gr.File(
                    label="PNG", file_types=[".png"], height=120, elem_id="create-restore", type="filepath"
                )
        with gr.Column(scale=3, min_width=280):
            status = gr.Markdown(
                "Press *Create*. The same seed makes the same pictures.", elem_id="create-status"
            )
            gallery = gallery_of("Pictures", "create-gallery", columns=4)
            settings = gr.Textbox(
                label="Settings of the chosen picture", lines=6, interactive=False, elem_id="create-settings"
            )
            download = gr.DownloadButton(
                "Download with settings", interactive=False, elem_id="create-download"
            )
    with gr.Accordion("All pictures of this session", open=False):
        gr.Markdown("The newest come first. They are on this machine only, until the page is closed.")
        history = gallery_of("History", "history", columns=8)

    keep = asked.pop("keep")
    names = list(asked)

    def run(session: Session, keep: bool, *values: Any) -> Any:
        given = dict(zip(names, values, strict=True))
        given["class_labels"] = chosen(given.get("class_labels"))
        given["cluster"] = chosen(given.get("cluster"))
        if not keep:
            given["seed"] = create.roll()
        yield [], "Working ...", [], given["seed"]
        for progress in create.create(models, session, limits, given):
            made = cells(progress.done)
            yield made, progress.text(), progress.done, given["seed"]

    outputs = [gallery, status, shown, asked["seed"]]
    running = start.click(
        told(run),
        [state, keep, *asked.values()],
        outputs,
        show_progress_on=[status],
        scroll_to_output=False,
        **WORK,
    )
    running.then(_history, state, history, show_progress="hidden", **LIGHT)
    stop.click(None, cancels=[running], api_visibility="private").then(
        _history, state, history, show_progress="hidden", **LIGHT
    )

    def back(path: str | None, session: Session) -> Any:
        recipe, given = create.restore(models, limits, path)
        values = [given.get(name) for name in names]
        for i, name in enumerate(names):
            if name in ("class_labels", "cluster") and values[i] is None:
                values[i] = ANY
        kept = session.keep(
            open_upload(path, limits), recipe, f"restored: seed {given['seed']}, picture {recipe.image}"
        )
        return [
            *values,
            True,
            cells([kept]),
            f"Restored seed {given['seed']}. *Create* makes its {given['count']} pictures again.",
            [kept],
            create.described(kept),
        ]

    dropped.upload(
        told(back),
        [dropped, state],
        [*asked.values(), keep, gallery, status, shown, settings],
        show_progress="minimal",
        **WORK,
    )

    def pick(session: Session, pictures: list[Any], event: gr.SelectData) -> Any:
        return _picked(pictures, event.index)

    def pick_old(session: Session, event: gr.SelectData) -> Any:
        return _picked(session.kept[::-1], event.index)

    gallery.select(told(pick), [state, shown], [settings, download], show_progress="hidden", **LIGHT)
    history.select(told(pick_old), [state], [settings, download], show_progress="hidden", **LIGHT)


def _history(session: Session) -> Any:
    return cells(session.kept[::-1])


def _picked(pictures: list[Any], index: Any) -> Any:
    if not isinstance(index, int) or not 0 <= index < len(pictures) or not pictures[index].path.exists():
        return "This picture is gone.", gr.DownloadButton(interactive=False)
    kept = pictures[index]
    return create.described(kept), gr.DownloadButton(value=str(kept.path), interactive=True)


def _controls(models: Models, limits: Limits) -> dict[str, Any]:
    """Lay out what a request has, by the names that `create.request_of` knows, and "keep"."""
    asked: dict[str, Any] = {}
    if models.takes_text:
        asked["prompt"] = gr.Textbox(
            label="Words", placeholder="red heart with wings", elem_id="create-prompt", max_length=500
        )
    if models.classes:
        asked["class_labels"] = gr.Dropdown(
            [ANY, *models.classes], value=ANY, label="Class", info="any: each in turn", elem_id="create-class"
        )
    if models.clusters:
        asked["cluster"] = gr.Dropdown(
            [ANY, *map(str, models.clusters)],
            value=ANY,
            label="Cluster",
            info="pictures that are alike",
            elem_id="create-cluster",
        )
    with gr.Row(elem_classes="seed-row"):
        asked["seed"] = seed_of(0, "create-seed")
        dice = gr.Button("⚄ Roll", elem_id="create-dice", min_width=90, scale=0)
    asked["keep"] = gr.Checkbox(True, label="Keep the seed for the next pictures", elem_id="create-keep")
    asked["count"] = gr.Slider(1, limits.pictures, 16, step=1, label="Pictures", elem_id="create-count")
    settled = models.pipeline.settle()
    with gr.Accordion("More settings", open=False, elem_id="create-more"):
        asked["solver"] = gr.Dropdown(
            models.solvers, value=settled["solver"], label="Solver", elem_id="create-solver",
            info="mean: one evaluation a step" if "mean" in models.solvers else None,
        )  # fmt: skip
        asked["steps"] = gr.Slider(
            1, limits.steps, settled["steps"], step=1, label="Steps", elem_id="create-steps"
        )
        _follows(models, asked["solver"], asked["steps"], "solver", "steps")
        if models.latent_solvers:
            asked["latent_solver"] = gr.Dropdown(
                models.latent_solvers, value=settled["latent_solver"], label="Solver of the latent sampler"
            )
            asked["latent_steps"] = gr.Slider(
                1,
                limits.steps,
                settled["latent_steps"],
                step=1,
                label="Latent steps",
                elem_id="create-latent",
            )
            _follows(models, asked["latent_solver"], asked["latent_steps"], "latent_solver", "latent_steps")
        for name, (low, high, best) in models.strengths.items():
            asked[name] = gr.Slider(
                low, high, best, step=0.05, label=_STRENGTHS[name], elem_id=f"create-{name}"
            )
        asked["first_image"] = gr.Number(
            0, label="First picture", precision=0, minimum=0, maximum=10**6,
            info="to go on after the last of a seed",
        )  # fmt: skip
    dice.click(create.roll, None, asked["seed"], show_progress="hidden", **LIGHT)
    return asked


def _follows(models: Models, solver: gr.Dropdown, steps: gr.Slider, name: str, of: str) -> None:
    """Let the steps be those that a solver has by itself when another is chosen."""

    def usual(value: str) -> int:
        return int(models.pipeline.settle(**{name: value})[of])  # type: ignore[arg-type]

    solver.input(told(usual), solver, steps, show_progress="hidden", **LIGHT)
