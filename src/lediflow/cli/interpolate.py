"""`lediflow interpolate`: from one picture to the next, as images, a grid and an animation."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lediflow.cli.editing import (
    EditSolver,
    EditSteps,
    Output,
    Replace,
    cell,
    check_files,
    listed_pictures,
    loaded,
    print_report,
    write_grid,
    write_pngs,
)
from lediflow.cli.options import (
    BatchSize,
    Classes,
    CodecFolder,
    Device,
    Dtype,
    FlowSolver,
    Json,
    Model,
    Seed,
    Steps,
    listed,
)


def interpolate(
    model: Model,
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE...|FOLDER]", help="Pictures, or folders of them.")
    ] = None,
    output: Output = Path("interpolated"),
    seeds: Annotated[
        list[str] | None, typer.Option(help="Go through generated images instead: their seeds, as 1,2,3.")
    ] = None,
    num_images: Annotated[
        int, typer.Option("-n", "--num-images", help="Images from each picture to the next, both included.")
    ] = 8,
    space: Annotated[str, typer.Option(help="noise, or latent for z.")] = "noise",
    path: Annotated[str, typer.Option(help="slerp or linear.")] = "slerp",
    loop: Annotated[bool, typer.Option("--loop", help="Go back to the first picture.")] = False,
    animation: Annotated[
        str | None, typer.Option(help="Also write animation.gif, .webp, .apng or .mp4.", show_default=False)
    ] = None,
    fps: Annotated[float, typer.Option(help="Images a second of the animation.")] = 12.0,
    scale: Annotated[int, typer.Option(help="Enlarge the animation so many times.")] = 1,
    steps: Steps = None,
    solver: FlowSolver = None,
    latent_steps: EditSteps = None,
    latent_solver: EditSolver = None,
    classes: Classes = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    overwrite: Replace = False,
    codec: CodecFolder = None,
    device: Device = None,
    dtype: Dtype = "fp32",
    as_json: Json = False,
) -> None:
    """Go from one picture to the next, or from one seed to the next, through pictures in between.

    Examples:

        lediflow interpolate runs/flowers rose.jpg tulip.jpg -n 12 --output interpolated

        lediflow interpolate runs/flowers photos --loop --animation webp --fps 24 -n 24

        lediflow interpolate runs/flowers --seeds 3,14,15 --space latent --path linear
    """
    from lediflow.errors import UserError
    from lediflow.files import shown
    from lediflow.pipelines.animation import check_animation, save_animation
    from lediflow.pipelines.photos import open_photo
    from lediflow.pipelines.recipes import file_input

    if bool(images) == bool(seeds):
        raise UserError("give pictures, or --seeds for generated images, and not both")
    if animation is not None:
        check_animation(animation, fps=fps, scale=scale)
    numbers = [part for part in listed(seeds) if not part.isdecimal()]
    if numbers:
        raise UserError(f"--seeds takes whole numbers, as 1,2,3, not {numbers[0]!r}")
    sources = listed_pictures(images or [])
    check_files(output, sources, overwrite=overwrite)
    began = time.perf_counter()
    ends: list[dict[str, Any]] = [{"seed": int(part)} for part in listed(seeds)]
    failed: list[dict[str, str]] = []
    for source in sources:
        try:
            open_photo(source)
            ends.append(file_input(source))
        except UserError as error:
            failed.append({"image": shown(source), "error": str(error)})
            print(f"error: {error}; it is left out", file=sys.stderr)
    if len(ends) < 2:
        raise UserError(f"an interpolation goes between two or more images or seeds, not {len(ends)}")
    _refuse_two_models([Path(end["path"]) for end in ends if "path" in end])
    settings = {
        "num_images": num_images,
        "space": space,
        "path": path,
        "loop": loop,
        "steps": steps,
        "solver": solver,
        "latent_steps": latent_steps,
        "latent_solver": latent_solver,
        "class_labels": classes,
        "seed": seed,
        "batch_size": batch_size,
        "dtype": dtype,
    }
    pipeline, recipe_of = loaded(model, "interpolate", settings, device, codec)
    recipe = recipe_of(ends)
    out = recipe.make(pipeline)
    paths = [output / f"{i:06d}.png" for i in range(len(out.images))]
    write_pngs(recipe, out.images, paths)
    shape = pipeline.picture_shape()
    cells = [cell(image, shape) for image in out.images]
    across = num_images if len(cells) == num_images else num_images - 1  # a row for each leg
    write_grid(output, [cells[i : i + across] for i in range(0, len(cells), across)])
    files = [str(path) for path in paths]
    if animation is not None:
        files.append(str(output / f"animation.{animation}"))
        save_animation(output / f"animation.{animation}", out.images, fps=fps, scale=scale)
    entry = {"image": [end.get("path", end.get("seed")) for end in ends], "files": files, "nfe": out.nfe}
    entry["ms"] = round(1000 * (time.perf_counter() - began), 1)
    report = {"model": model, "tool": "interpolate", "output": str(output), "settings": settings}
    print_report({**report, "images": [entry, *failed], "failed": len(failed)}, as_json=as_json)
    if failed:
        raise typer.Exit(1)


def _refuse_two_models(paths: list[Path]) -> None:
    """Refuse generated pictures of two models: each has a latent space of its own."""
    from lediflow.errors import UserError
    from lediflow.files import quoted
    from lediflow.pipelines.recipes import read_recipe

    made: dict[str, Path] = {}
    for path in paths:
        try:
            made.setdefault(read_recipe(path).weights, path)
        except UserError:  # a photo
            continue
    if len(made) > 1:
        a, b = list(made.values())[:2]
        raise UserError(
            f"{quoted(a)} and {quoted(b)} were made by two different models; go between images of one, or "
            "between photos"
        )
