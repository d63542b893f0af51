"""A run's pipeline as a folder for others: weights, model card, config and pictures, without local paths.

FOLDER/model_index.json ...  the pipeline, as `from_pretrained` loads it
FOLDER/README.md             the model card
FOLDER/config.yaml           every setting, with names instead of paths of this machine
FOLDER/samples.png           the first images of seed 0, none picked out
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lediflow.errors import UserError
from lediflow.files import read_json, shown, write_text
from lediflow.pictures import image_grid
from lediflow.pipelines.base import ImagePipeline
from lediflow.pipelines.load import load_pipeline, load_upsampler
from lediflow.training.card import model_card
from lediflow.training.config import Config, load_run_config
from lediflow.training.run_pipelines import UPSAMPLE, pipeline_stages

PICTURE = "samples.png"


def write_publication(
    model: Path,
    folder: Path,
    name: str,
    *,
    licence: str = "",
    images: int = 16,
    half: bool = False,
    device: Any = "cpu",
) -> None:
    """Write what is shared of a run to an empty folder.

    A codec that is a folder of this machine comes along; one of the Hub is loaded from there. A frozen text
    encoder does not come along, for it may be much larger than the model: its name and fingerprint do.

    Args:
        model: a run folder, or that of one of its stages that has a pipeline.
        folder: where to.
        name: under which it will be known, owner/name.
        licence: of the weights, an identifier of the Hub; "" for none said.
        images: on the picture; 0 for no picture.
        half: store the weights as fp16, but for a codec's, which would then be another codec; they are loaded
            as fp32 unless another type is asked for.
        device: that makes them.

    Raises:
        UserError: no run, or no trained pipeline in it.
    """
    run, below = _run_of(model)
    config = load_run_config(run)
    pipelines = pipeline_stages(run, config)
    if below not in pipelines:
        raise UserError(f"{shown(model)} has no trained pipeline; finish its training first")
    load: Any = load_upsampler if pipelines[below][0].kind == UPSAMPLE else load_pipeline
    pipeline = load(model).to(device)
    if half:
        _round(pipeline, torch.float16)
        _round(pipeline, torch.float32)  # the picture is made by the weights that are stored
    space = pipeline.config.codec_space
    if space and Path(space["codec"]).expanduser().exists():
        pipeline.load_codec()
        pipeline.register_to_config(codec_space={**space, "codec": _name(space["codec"])})
    encoder = pipeline.config.get("prompt_encoder")
    if encoder and Path(encoder["name"]).is_absolute():
        pipeline.register_to_config(prompt_encoder={**encoder, "name": _name(encoder["name"])})
    picture = ""
    if images and isinstance(pipeline, ImagePipeline):
        pipeline.set_progress_bar_config(disable=True)
        made = pipeline(images, seed=0, output_type="pt").images
        grid = image_grid(made, scale=max(1, 64 // made.shape[-1]))
        picture = PICTURE
    if half:
        _round(pipeline, torch.float16)
    pipeline.save_pretrained(folder)
    _forget_origin(folder)
    if picture:
        grid.save(folder / picture)
    told = _without_paths(config)
    told_card = model_card(run, told, _commit(run), folder=below, name=name, licence=licence, picture=picture)
    for path in _paths(config):
        told_card = told_card.replace(path, _name(path))
    write_text(folder / "README.md", told_card)
    write_text(folder / "config.yaml", told.to_yaml())


def _round(pipeline: Any, dtype: torch.dtype) -> None:
    """Bring the networks of a run to a type; the codec stays the one whose latents they know."""
    for name, part in pipeline.components.items():
        if name != "vae" and isinstance(part, torch.nn.Module):
            part.to(dtype)


def _forget_origin(folder: Path) -> None:
    """Remove where the parts were loaded from, which diffusers writes into their configs."""
    for path in folder.rglob("*.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("_name_or_path", None) is not None:
            write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _run_of(model: Path) -> tuple[Path, str]:
    """The run folder, and which of its pipelines."""
    if (model / "config.yaml").is_file():
        return model, "."
    if (model.resolve().parent / "config.yaml").is_file():
        return model.resolve().parent, model.resolve().name
    raise UserError(
        f"{shown(model)} is no run folder (it has no config.yaml), and what is shared tells how it was "
        "trained; give the folder that `lediflow train --output` wrote"
    )


def _commit(run: Path) -> str:
    kept = read_json(run / "dataset.json", "delete it, and the model card will not name the dataset's commit")
    return (kept or {}).get("commit") or ""


def _without_paths(config: Config) -> Config:
    """The same config with names instead of this machine's paths."""
    data = {
        key: _name(value)
        for key in ("train", "validation")
        if (value := getattr(config.data, key)) in _paths(config)
    }
    update: dict[str, Any] = {"data": config.data.model_copy(update=data)}
    if config.codec is not None and config.codec.model in _paths(config):
        update["codec"] = config.codec.model_copy(update={"model": _name(config.codec.model)})
    if config.text.encoder in _paths(config):
        update["text"] = config.text.model_copy(update={"encoder": _name(str(config.text.encoder))})
    return config.model_copy(update=update)


def _paths(config: Config) -> list[str]:
    """The settings that name a file or folder of this machine, the longest first."""
    codec = config.codec.model if config.codec else None
    said = [config.data.train, config.data.validation, codec, config.text.encoder]
    return sorted({x for x in said if x and _is_local(x)}, key=len, reverse=True)


def _is_local(name: str) -> bool:
    path = Path(name).expanduser()
    return path.is_absolute() or name.startswith((".", "~")) or (name.count("/") > 0 and path.exists())


def _name(path: str) -> str:
    return Path(path).name or "data"
