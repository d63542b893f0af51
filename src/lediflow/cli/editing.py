"""What the editing commands share: images or a folder in, PNG files, a grid and a report out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from lediflow.pipelines.recipes import Recipe

GRID_ROWS = 24

Images = Annotated[
    list[Path], typer.Argument(metavar="IMAGE...|FOLDER", help="Pictures, or folders of them.", exists=False)
]
Output = Annotated[Path, typer.Option("-o", "--output", help="Folder for the PNG files and grid.png.")]
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]
Strength = Annotated[float, typer.Option(help="From 0, hardly any change, to 1, another picture.")]
Variants = Annotated[int, typer.Option("-n", "--num-images", help="How many variants of each picture.")]
EditSolver = Annotated[
    str | None,
    typer.Option("--latent-solver", help="Of the latent sampler, both ways; default midpoint."),
]
EditSteps = Annotated[int | None, typer.Option("--latent-steps", help="Of the latent sampler; default 8.")]
ConstantNoise = Annotated[
    bool, typer.Option("--constant-noise", help="The same noise of x ~ P_L for all: only z differs.")
]


def listed_pictures(given: Sequence[Path]) -> list[Path]:
    """Return the picture files that are named, and those in named folders, in order.

    Raises:
        UserError: there is no such file or folder, or a folder has no pictures.
    """
    from lediflow.data.folders import visible_files
    from lediflow.data.opening import picture_suffixes
    from lediflow.errors import UserError
    from lediflow.files import quoted

    found: list[Path] = []
    for path in given:
        if path.is_dir():
            below = [file for file in visible_files(path) if file.suffix.lower() in picture_suffixes()]
            if not below:
                raise UserError(f"{quoted(path)} holds no images; name a folder that does, or image files")
            found += below
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"there is no file or folder {quoted(path)}")
    return found


def mask_of(mask: str | None, picture: Path) -> Path | str | None:
    """Return the mask of a picture: "alpha", the file, or that of the picture's name in a folder.

    Raises:
        UserError: there is none.
    """
    from lediflow.errors import UserError
    from lediflow.files import quoted

    if mask is None or mask == "alpha":
        return mask
    if not Path(mask).is_dir():
        if not Path(mask).exists():
            raise UserError(f"there is no mask {quoted(mask)}; give a file, a folder or 'alpha'")
        return Path(mask)
    named = sorted(file for file in Path(mask).iterdir() if file.stem == picture.stem)
    if not named:
        raise UserError(f"the folder {quoted(mask)} has no mask named {quoted(picture.stem)}")
    return named[0]


def check_files(output: Path, sources: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse a folder that holds PNG files already, or the pictures themselves.

    Raises:
        UserError: it does; nothing has been written.
    """
    from lediflow.errors import UserError
    from lediflow.files import quoted

    if any(path.parent.resolve() == output.resolve() for path in sources):
        raise UserError(
            f"{quoted(output)} holds the pictures themselves, and they are never overwritten; choose another "
            "--output"
        )
    if not overwrite and output.is_dir() and any(output.glob("*.png")):
        raise UserError(f"{quoted(output)} holds PNG files already; give --overwrite, or another --output")


def output_names(sources: Sequence[Path]) -> list[str]:
    """Return a name for each picture: that of its file, and a number where several have the same."""
    names: list[str] = []
    for path in sources:
        name, count = path.stem, 2
        while name in names:
            name, count = f"{path.stem}-{count}", count + 1
        names.append(name)
    return names


def paths_of(output: Path, name: str, count: int, several: bool) -> list[Path]:
    """Return the files of what is made of one picture, numbered where there may be several."""
    width = len(str(count - 1))
    return [output / (f"{name}-{i:0{width}d}.png" if several else f"{name}.png") for i in range(count)]


def loaded(model: str, tool: str, settings: dict[str, Any], device: str | None, codec: str | None) -> Any:
    """Load a model for a tool, and settle in `settings` the solver and the precision.

    Returns:
        The pipeline, and a function (inputs, mask) -> `Recipe`.

    Raises:
        UserError: the model cannot do this, or a setting is wrong.
    """
    from lediflow.devices import check_device, settle_precision
    from lediflow.pipelines.load import load_pipeline
    from lediflow.pipelines.recipes import Recipe, tool_of

    where = check_device(device)
    settings["dtype"] = settle_precision(settings["dtype"], where)
    pipeline = load_pipeline(model).to(where)
    pipeline.set_progress_bar_config(disable=True)
    tool_of(pipeline, tool, model)
    if codec is not None:
        pipeline.load_codec(codec)
    settled = pipeline.settle(solver=settings["solver"], steps=settings["steps"])
    settings.update({name: settled[name] for name in ("solver", "steps")})
    digest = pipeline.digest()

    def recipe(inputs: Sequence[dict[str, Any]], mask: dict[str, Any] | None = None) -> Recipe:
        return Recipe(tool, model, digest, settings, tuple(inputs), mask)

    return pipeline, recipe


def write_pngs(recipe: Recipe, images: Sequence[Any], paths: Sequence[Path], *, first: int = 0) -> None:
    """Write images, from number `first` of a recipe on, with the text that says how each was made.

    Raises:
        UserError: the folder cannot be written.
    """
    from lediflow.files import explained, written_whole

    for i, (image, path) in enumerate(zip(images, paths, strict=True), first):
        with explained(path), written_whole(path) as unfinished:
            image.save(unfinished, pnginfo=recipe.of(i).png_text())


def edit_each(
    tool: str,
    model: str,
    given: Sequence[Path],
    output: Path,
    settings: dict[str, Any],
    *,
    mask: str | None = None,
    device: str | None,
    codec: str | None,
    overwrite: bool,
    as_json: bool,
    row: Callable[[Any, Any, tuple[int, int, int]], list[Tensor]] | None = None,
) -> None:
    """Apply a tool to each picture; what cannot be used is named, and the others are made all the same.

    The process ends with exit code 1 where any failed; a mistake in all of them is raised.

    Args:
        tool: the pipeline's method.
        model: as the user named it.
        given: files and folders.
        output: folder.
        settings: of the method.
        mask: see `mask_of`.
        device: name of one, or None.
        codec: folder or Hub id, or None.
        overwrite: replace files that are there.
        as_json: print the report as JSON.
        row: (photo, the method's output, (C, H, W)) -> cells of the grid, (N, C, H, W) each; None for the
            picture and what was made of it.

    Raises:
        UserError: a setting is wrong, or no picture can be used; nothing is written then.
    """
    from lediflow.cli.counting import counting
    from lediflow.errors import UserError
    from lediflow.files import shown
    from lediflow.pipelines.photos import open_photo
    from lediflow.pipelines.recipes import file_input

    sources = listed_pictures(given)
    check_files(output, sources, overwrite=overwrite)
    pipeline, recipe_of = loaded(model, tool, settings, device, codec)
    shape = pipeline.picture_shape()
    rows: list[list[Tensor]] = []
    entries: list[dict[str, Any]] = []
    failed: list[UserError] = []
    with counting("images", silent=as_json) as update:
        for done, (source, name) in enumerate(zip(sources, output_names(sources), strict=True), 1):
            began = time.perf_counter()
            try:
                found = mask_of(mask, source)
                seen = {"path": "alpha"} if found == "alpha" else found and file_input(Path(found))
                recipe = recipe_of([file_input(source)], seen or None)
                out = recipe.make(pipeline)
                width = len(str(len(out.images) - 1))
                names = [f"{name}-{i:0{width}d}" for i in range(len(out.images))]
                paths = [
                    output / f"{n}.png" for n in (names if settings.get("num_images", 1) > 1 else [name])
                ]
                if len(rows) < GRID_ROWS:
                    rows.append((row or picture_and_images)(open_photo(source), out, shape))
                write_pngs(recipe, out.images, paths)
            except UserError as error:
                failed.append(error)
                entries.append({"image": shown(source), "error": str(error)})
                if len(sources) > 1:
                    print(f"error: {shown(source)}: {error}", file=sys.stderr)
            else:
                ms = round(1000 * (time.perf_counter() - began), 1)
                files = [str(path) for path in paths]
                entries.append({"image": shown(source), "files": files, "nfe": out.nfe, "ms": ms})
            update(done, len(sources))
    if len(failed) == len(sources):
        raise failed[0]
    write_grid(output, rows)
    report = {"model": model, "tool": tool, "output": str(output), "settings": settings}
    print_report({**report, "images": entries, "failed": len(failed)}, as_json=as_json)
    if failed:
        raise typer.Exit(1)


def picture_and_images(photo: Any, out: Any, shape: tuple[int, int, int]) -> list[Tensor]:
    """Return a row of the grid: the picture, then what was made of it."""
    return [cell(photo, shape), *(cell(image, shape) for image in out.images)]


def cell(picture: Any, shape: tuple[int, int, int]) -> Tensor:
    """Return the middle of a picture at the model's size, (1, C, H, W)."""
    from lediflow.pictures import to_float
    from lediflow.pipelines.photos import largest_region, photo_tensor, resized

    photo = photo_tensor(picture, shape[0])  # type: ignore[arg-type]  # 1 or 3, as every model has
    part = largest_region((photo.shape[1], photo.shape[2]), shape[1:]).cut(photo)[None]
    return resized(part if part.is_floating_point() else to_float(part), shape[1:])


def write_grid(output: Path, rows: Sequence[Sequence[Tensor]]) -> None:
    """Write grid.png: a row for each picture."""
    import torch

    from lediflow.files import explained, written_whole
    from lediflow.pictures import image_grid

    stacked = [torch.cat(list(row)) for row in rows]
    path = output / "grid.png"
    with explained(path), written_whole(path) as unfinished:
        image_grid(stacked, scale=max(1, 64 // stacked[0].shape[-1])).save(unfinished)


def print_report(report: dict[str, Any], *, as_json: bool) -> None:
    """Print what was made, where, and what it took."""
    if as_json:
        print(json.dumps(report))
        return
    good = [entry for entry in report["images"] if "files" in entry]
    count = sum(len(entry["files"]) for entry in good)
    evaluations = ", ".join(f"{name} {n}" for name, n in good[0]["nfe"].items())
    print(f"{count} images in {report['output']}; grid.png shows the first together")
    print(f"network evaluations for one image: {evaluations}")
    if report["failed"]:
        print(f"{report['failed']} of {len(report['images'])} pictures could not be used; see above")
