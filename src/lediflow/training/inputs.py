"""From a config's `data` and `codec` to what the stages train on, and what a run keeps of it."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from lediflow.codecs import Codec, CodecSpace, local_name
from lediflow.data.batches import MapData, TrainingData
from lediflow.data.codec_latents import CodecLatents, is_codec_latents
from lediflow.data.encoded_images import EncodedImages
from lediflow.data.images import ImageData
from lediflow.data.streams import StreamData
from lediflow.errors import UserError
from lediflow.files import read_json, shown, write_text
from lediflow.hub import split_revision
from lediflow.training.config import Config

CODEC_SPACE = "codec_space.json"  # in the run folder: codec and scale of the latents it trains on
DATASET = "dataset.json"  # in the run folder: the commit of a Hub data set
_RENEW = "delete it if the dataset is the same as ever, or train in another folder"
BROKEN = "broken-images.txt"  # in the run folder: what was left out, one line each


def open_data(config: Config, run: Path | None = None) -> TrainingData:
    """Open `data.train`: images, a stream of them, or latents where the config has a codec.

    Args:
        config: of the run.
        run: folder of the run that is resumed, if any; a Hub data set is read at the commit it began with.

    Raises:
        UserError: no dataset, unreadable data, images for a config with a codec (with the command that
            encodes them), latents for one without, or latents of another codec or size; or not as many
            classes as `data.classes` says.
    """
    if config.data.train is None:
        raise UserError("no dataset: give --data FOLDER (or a Parquet file), or set data.train")
    opened = _open(config, _as_begun(config.data.train, run))
    wanted, there = config.data.classes, opened.num_classes
    if wanted and there != wanted:
        named = f": {textwrap.shorten(', '.join(opened.class_names), 100)}" if there else ""
        advice = "" if there else ", or give each class a subfolder"
        raise UserError(
            f"data.classes is {wanted}, but {config.data.train} has {there} classes{named}; "
            f"set data.classes={there}{advice}"
        )
    return opened


def _as_begun(dataset: str, run: Path | None) -> str:
    kept = read_json(run / DATASET, _RENEW) if run else None
    if not kept or kept.get("train") != dataset:
        return dataset
    if not kept.get("commit"):
        raise UserError(f"{run}/{DATASET} names no commit; {_RENEW}")
    return f"{split_revision(dataset)[0]}@{kept['commit']}"


def keep_dataset(run: Path, config: Config, data: TrainingData) -> None:
    """Write into the run folder at which commit a Hub data set was read, where the Hub tells."""
    if data.commit and not isinstance(data, CodecLatents):
        write_text(run / DATASET, json.dumps({"train": config.data.train, "commit": data.commit}, indent=1))


def taught_classes(data: TrainingData) -> dict[str, str]:
    """Return the names of the classes that have images, by index; of a stream all, which are not counted."""
    labels = getattr(data, "labels", None)
    there = range(len(data.class_names)) if labels is None else labels.unique().tolist()
    return {str(index): data.class_names[index] for index in there}


def _open(config: Config, dataset: str) -> TrainingData:
    data = config.data
    if config.codec is not None and data.encode:
        return _open_encoding(config, dataset)
    if config.codec is not None:
        return _open_latents(config, dataset)
    if is_codec_latents(dataset):
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
        if config.text.encoder:
            raise UserError("data.streaming does not go with texts (text.encoder); leave one of both out")
        return StreamData(dataset, shuffle_block=data.shuffle_block, classes=data.classes, **options)
    return ImageData(dataset, cache_gb=data.cache_gb, texts=config.text.columns, **options)


def describe(data: TrainingData, config: Config) -> str:
    """Return what is trained on, in words."""
    name, size = str(config.data.train), config.data.image_size
    if data.commit and not isinstance(data, CodecLatents):
        name = f"{split_revision(name)[0]} (commit {data.commit[:12]})"
    if isinstance(data, EncodedImages):
        return f"{len(data)} images of {size} px from {name}, encoded by {data.space.codec} at every step"
    if isinstance(data, CodecLatents):
        shape = "x".join(map(str, data.shape))
        return f"{len(data)} latents of {shape} ({size} px) from {name}, codec {data.space.codec}"
    if isinstance(data, MapData):
        return f"{len(data)} images of {size} px from {name}"
    return f"a stream of images of {size} px from {name}"


def codec_space(run: Path) -> dict[str, Any] | None:
    """Return codec and scale of the latents that the run trains on, None if it trains on pixels."""
    return read_json(run / CODEC_SPACE, _RENEW)


def refuse_other_latents(run: Path, data: TrainingData) -> None:
    """Raise UserError where the run's networks were trained on latents of another codec or scale."""
    there = codec_space(run)
    if there is None or not isinstance(data, (CodecLatents, EncodedImages)):
        return
    old, new = CodecSpace.from_dict(there), data.space
    if (old.hash, old.mean, old.std) != (new.hash, new.mean, new.std):
        raise UserError(
            f"{run} was trained on other latents than those in {shown(data.folder)} (another codec, or "
            "another set with another mean and standard deviation); give those, or choose another --output"
        )


def keep_codec_space(run: Path, data: TrainingData) -> None:
    """Write codec and scale of the latents into the run folder, where the pipelines take them from."""
    if isinstance(data, (CodecLatents, EncodedImages)):
        write_text(run / CODEC_SPACE, json.dumps(data.space.to_dict(), indent=1))


def report_broken(run: Path, data: TrainingData) -> None:
    """Write the names of the images that were left out so far, and why, into the run folder."""
    broken = getattr(data, "broken", [])
    if broken:
        write_text(run / BROKEN, "".join(f"{image.name}\t{image.reason}\n" for image in broken))


def _pair(config: Config) -> str:
    upsampler, size = config.section("upsampler"), config.data.image_size
    way = " --enlarge pixels" if upsampler.enlarge == "pixels" else ""
    return f"{size // upsampler.scale}:{size}{way}"


def _open_encoding(config: Config, dataset: str) -> EncodedImages:
    """Open images that the codec encodes at every step.

    Raises:
        UserError: no such codec, latents instead of images, or another factor or number of channels.
    """
    data, wanted = config.data, config.codec
    assert wanted is not None, "the caller looked"
    if is_codec_latents(dataset) or data.streaming:
        what = "data.streaming" if data.streaming else f"the latents in {shown(dataset)}"
        raise UserError(f"data.encode takes images and encodes them; it does not go with {what}")
    codec = Codec.load(wanted.model)
    if (codec.factor, codec.channels) != (wanted.factor, wanted.channels):
        raise UserError(
            f"the codec {codec.name!r} has factor {codec.factor} and {codec.channels} channels; set "
            f"codec.factor={codec.factor} codec.channels={codec.channels}"
        )
    images = ImageData(
        dataset,
        image_size=data.image_size,
        channels=1 if codec.in_channels == 1 else 3,
        crop=data.crop,
        flip=data.flip,
        max_broken=data.max_broken,
        cache_gb=data.cache_gb,
        texts=config.text.columns,
    )
    pairs = None
    if (upsampler := config.upsampler) is not None:
        way = "pixels" if upsampler.enlarge == "pixels" else "latents"
        pairs = data.image_size // upsampler.scale, data.image_size, way
    return EncodedImages(images, codec, pairs)


def _open_latents(config: Config, folder: str) -> CodecLatents:
    codec, size = config.codec, config.data.image_size
    assert codec is not None, "the caller looked"
    sizes = f"--image-size {size}" if config.auxiliary is not None else f"--pairs {_pair(config)}"
    again = f"lediflow encode DATASET --codec {codec.model} {sizes} --output DIR"
    if not is_codec_latents(folder):
        command = again.replace("DATASET", folder).replace("DIR", "latents")
        raise UserError(
            f"this config trains on latents of {codec.model!r}, not on images. First type\n"
            f"  {command}\nthen train with --data latents"
        )
    if config.data.crop == "random" or config.data.streaming:
        key = "data.crop=random" if config.data.crop == "random" else "data.streaming=true"
        raise UserError(f"{key} does not work on latents, which are stored as they are; leave it out")
    data = CodecLatents(folder, flip=config.data.flip, cache_gb=config.data.cache_gb)
    wanted_texts, kept = config.text.columns, data.meta["text"]
    if wanted_texts and kept not in wanted_texts:
        found = f"the texts of column {kept}" if kept else "no texts"
        raise UserError(
            f"the latents in {folder} hold {found}; encode the images with\n"
            f"  {again} --text {wanted_texts[0]}\nor set text.column, or leave text.encoder out"
        )
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
