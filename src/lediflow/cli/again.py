"""`lediflow sample --again`: the image of a PNG of ours, made once more by what the PNG says of itself."""

from __future__ import annotations

import json
from pathlib import Path


def make_again(
    file: Path,
    model: str | None,
    output: Path,
    *,
    overwrite: bool,
    codec: str | None,
    text_encoder: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Make an image again, write it under its name, and tell whether it is the same.

    Args:
        file: PNG with a recipe.
        model: where its model is now; None for where it was.
        output: folder.
        overwrite: replace a file of that name.
        codec: folder or Hub id, or None.
        text_encoder: folder or Hub id, or None.
        device: name of one, or None.
        as_json: print the report as JSON.

    Raises:
        UserError: the PNG does not say how it was made, its model or a picture that it was made of has
            changed, or a file of its name is there.
    """
    from PIL import ImageChops

    from lediflow.cli.editing import write_pngs
    from lediflow.devices import check_device
    from lediflow.errors import UserError
    from lediflow.files import quoted
    from lediflow.pipelines.load import load_pipeline
    from lediflow.pipelines.photos import open_photo
    from lediflow.pipelines.recipes import read_recipe

    recipe = read_recipe(file)
    path = output / file.name
    if path.resolve() == file.resolve() or (path.exists() and not overwrite):
        raise UserError(f"{quoted(path)} is there already; choose another --output")
    pipeline = load_pipeline(model or recipe.model).to(check_device(device))
    pipeline.set_progress_bar_config(disable=True)
    if codec is not None:
        pipeline.load_codec(codec)
    if text_encoder is not None:
        pipeline.load_text_encoder(text_encoder)
    if pipeline.digest() != recipe.weights:
        raise UserError(
            f"{quoted(file)} was made by a model with other weights than {model or recipe.model} has now; "
            "give that model with --model"
        )
    images = recipe.make(pipeline).images
    if recipe.image >= len(images):
        raise UserError(f"{quoted(file)} was made by another version of lediflow, or is damaged")
    image, before = images[recipe.image], open_photo(file)
    same = before.size == image.size and before.mode == image.mode
    same = same and ImageChops.difference(before, image).getbbox() is None
    write_pngs(recipe, [image], [path], first=recipe.image)
    report = {"image": str(path), "again": str(file), "same": same, "command": recipe.command()}
    if as_json:
        print(json.dumps(report))
        return
    print(f"{path}: {'the same, bit for bit' if same else 'not the same bit for bit'} as {file}")
    if not same:
        print("it was changed, or made on another kind of device or by another version")
    print(f"made by: {recipe.command()}")
