"""From a config's `data` and `codec` to what the stages train on, and what a run keeps of it."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from lediflow.codecs import LatentSpace, local_name
from lediflow.data.batches import MapData, TrainingData
from lediflow.data.images import ImageData
from lediflow.data.latents import LatentData, is_latents_folder
from lediflow.data.streams import StreamData
from lediflow.errors import UserError
from lediflow.files import write_text
from lediflow.training.config import Config

LATENT_SPACE = "latent_space.json"  # in the run folder: codec and scale of the latents it trains on
BROKEN = "broken-images.txt"  # in the run folder: what was left out, one line each


def open_data(config: Config) -> TrainingData:
    """Open `data.train`: images, a stream of them, or latents where the config has a codec.

    Raises:
        UserError: no dataset, unreadable data, images for a config with a codec (with the command that
            encodes them), latents for one without, or latents of another codec or size; or not as many
            classes as `data.classes` says.
    """
    if config.data.train is None:
        raise UserError("no dataset: give --data FOLDER (or a Parquet file), or set data.train")
    opened = _open(config, config.data.train)
    wanted, there = config.data.classes, opened.num_classes
    if wanted and there != wanted:
        named = f": {textwrap.shorten(', '.join(opened.class_names), 100)}" if there else ""
        advice = "" if there else ", or give each class a subfolder"
        raise UserError(
            f"data.classes is {wanted}, but {config.data.train} has {there} classes{named}; "
            f"set data.classes={there}{advice}"
        )
    return opened


def _open(config: Config, dataset: str) -> TrainingData:
    data = config.data
    if config.codec is not None:
        return _open_latents(config, dataset)
    if is_latents_folder(dataset):
        raise UserError(
            f"{dataset!r} holds a codec's latents, and this config trains on pixels; give the images, or "
            "a config with a codec (the presets whose names end in -sdv have one)"
        )
    options: dict[str, Any] = {
        "image_size": data.image_size,
        "channels": data.channels,
        "crop": data.crop,
        "flip": data.flip,
        "max_broken": data.max_broken,
    }
    if data.streaming:
        return StreamData(dataset, shuffle_block=data.shuffle_block, classes=data.classes, **options)
    return ImageData(dataset, cache_gb=data.cache_gb, **options)


def describe(data: TrainingData, config: Config) -> str:
    """Return what is trained on, in words."""
    name, size = config.data.train, config.data.image_size
    if isinstance(data, LatentData):
        shape = "x".join(map(str, data.shape))
        return f"{len(data)} latents of {shape} ({size} px) from {name}, codec {data.space.codec}"
    if isinstance(data, MapData):
        return f"{len(data)} images of {size} px from {name}"
    return f"a stream of images of {size} px from {name}"


def latent_space(run: Path) -> dict[str, Any] | None:
    """Return codec and scale of the latents that the run trains on, None if it trains on pixels."""
    path = run / LATENT_SPACE
    space: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return space


def refuse_other_latents(run: Path, data: TrainingData) -> None:
    """Raise UserError where the run's networks were trained on latents of another codec or scale."""
    there = latent_space(run)
    if there is None or not isinstance(data, LatentData):
        return
    old, new = LatentSpace.from_dict(there), data.space
    if (old.hash, old.mean, old.std) != (new.hash, new.mean, new.std):
        raise UserError(
            f"{run} was trained on other latents than those in {data.folder} (another codec, or another set "
            "with another mean and standard deviation); give those, or choose another --output"
        )


def keep_latent_space(run: Path, data: TrainingData) -> None:
    """Write codec and scale of the latents into the run folder, where the pipelines take them from."""
    if isinstance(data, LatentData):
        write_text(run / LATENT_SPACE, json.dumps(data.space.to_dict(), indent=1))


def report_broken(run: Path, data: TrainingData) -> None:
    """Write the names of the images that were left out so far, and why, into the run folder."""
    broken = getattr(data, "broken", [])
    if broken:
        write_text(run / BROKEN, "".join(f"{image.name}\t{image.reason}\n" for image in broken))


def _open_latents(config: Config, folder: str) -> LatentData:
    codec, size = config.codec, config.data.image_size
    assert codec is not None, "the caller looked"
    again = f"lediflow encode DATASET --codec {codec.model} --image-size {size} --output DIR"
    if not is_latents_folder(folder):
        command = again.replace("DATASET", folder).replace("DIR", "latents")
        raise UserError(
            f"this config trains on latents of {codec.model!r}, not on images. First type\n"
            f"  {command}\nthen train with --data latents"
        )
    if config.data.crop == "random" or config.data.streaming:
        key = "data.crop=random" if config.data.crop == "random" else "data.streaming=true"
        raise UserError(f"{key} does not work on latents, which are stored as they are; leave it out")
    data = LatentData(folder, flip=config.data.flip, cache_gb=config.data.cache_gb)
    space = data.space
    there = {"codec": space.codec, "image size": data.meta["image_size"], "factor": space.factor}
    wanted = {"codec": local_name(codec.model), "image size": size, "factor": codec.factor}
    there["channels"], wanted["channels"] = space.channels, codec.channels
    wrong = [f"{key} {there[key]}, not {wanted[key]}" for key in wanted if there[key] != wanted[key]]
    if wrong:
        raise UserError(
            f"the latents in {folder} do not fit the config ({'; '.join(wrong)}); encode the images with\n"
            f"  {again}\nor change codec.model, codec.factor, codec.channels or data.image_size with --set"
        )
    return data
