"""From a folder, a run, a Hub id or a built-in name to a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import logging

from lediflow.errors import UserError
from lediflow.files import readable_folder
from lediflow.hub import is_cached, split_revision, why_unreachable
from lediflow.models import built_in, built_in_names
from lediflow.pipelines.base import ImagePipeline
from lediflow.pipelines.codec import FORMAT
from lediflow.pipelines.flow_matching import FlowMatchingPipeline
from lediflow.pipelines.lediflow import LeDiFlowPipeline
from lediflow.pipelines.upsample import FlowUpsamplePipeline

PIPELINES: dict[str, Any] = {
    c.__name__: c for c in (LeDiFlowPipeline, FlowMatchingPipeline, FlowUpsamplePipeline)
}


def load_pipeline(model: str | Path, **kwargs: Any) -> ImagePipeline:
    """Load MODEL: a run folder, a stage folder with a pipeline, a saved pipeline, a Hub id, a built-in name.

    A Hub id may end with ``@revision``. A built-in name, such as "emoji", is of a model in the package.

    Raises:
        UserError: there is no such folder, or it has no weights, or they are damaged, or it is an upsampler.
    """
    return _load(
        model, ImagePipeline, "enlarges images and makes none; use it with `lediflow upsample`", kwargs
    )


def load_upsampler(model: str | Path, **kwargs: Any) -> FlowUpsamplePipeline:
    """Load MODEL as `load_pipeline` does, but one that enlarges images.

    Raises:
        UserError: as there, or it makes images itself.
    """
    refusal = "makes images and enlarges none; use it with `lediflow sample`"
    return _load(model, FlowUpsamplePipeline, refusal, kwargs)


def _load(model: str | Path, kind: Any, refusal: str, kwargs: dict[str, Any]) -> Any:
    """Load a pipeline of a kind; another is refused."""
    model = built_in(model) or model
    path = Path(model)
    if not path.exists() and (path.is_absolute() or str(model).partition("@")[0].count("/") != 1):
        raise UserError(
            f"no model {model}: give a run folder, a saved pipeline folder, a Hub id owner/name, or the name "
            f"of a model that comes with lediflow ({', '.join(built_in_names())})"
        )
    source: str | Path = model
    if path.exists():
        folders = [
            f for f in (path, readable_folder(path / "pipeline")) if (f / "model_index.json").is_file()
        ]
        if not folders:
            raise UserError(
                f"{model} has no trained pipeline (no model_index.json in it or in its pipeline folder); "
                "train all of auxiliary, flow and sampler first, or name RUN/baseline for plain flow matching"
            )
        source = folders[0]
    else:
        source, kwargs["revision"] = split_revision(str(model))
        asked = (source, "model_index.json", kwargs["revision"])
        if not is_cached(*asked) and (reason := why_unreachable(*asked)):
            raise UserError(
                f"{model} is no folder and not cached here, and the Hub does not give it ({reason}): give a "
                "run folder, a saved pipeline folder, or a Hub id owner/name"
            )
    try:
        config = DiffusionPipeline.load_config(source, revision=kwargs.get("revision"))
        if config["_class_name"] not in PIPELINES:
            raise UserError(f"{model} is a {config['_class_name']}, not one of {', '.join(PIPELINES)}")
        if not issubclass(PIPELINES[config["_class_name"]], kind):
            raise UserError(f"{model} {refusal}")
        if config.get("format") != FORMAT:
            raise UserError(
                f"{model} was saved by another version of lediflow, in a format that this one does not read; "
                "train again"
            )
        logging.disable_progress_bar()  # reading a folder takes a blink
        return PIPELINES[config["_class_name"]].from_pretrained(source, **kwargs)
    except UserError:
        raise
    except Exception as error:  # diffusers, the Hub and safetensors each raise their own kinds
        raise UserError(f"cannot load {model}: {str(error).splitlines()[0]}") from error
    finally:
        logging.enable_progress_bar()
