"""After training: how strongly should a model be guided that has learned its guidance?

For each strength in turn, images of several values are compared with real ones, held out where there are
some. The distance is taken in the features of the run's own encoder: those of an evaluation must not choose.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lediflow.codecs import CodecSpace
from lediflow.devices import check_device
from lediflow.errors import UserError
from lediflow.evaluation.real import RealImages
from lediflow.evaluation.request import drawn_prompts, texts_of
from lediflow.metrics.frechet import Moments, frechet_distance
from lediflow.networks.auxiliary import AuxiliaryModel
from lediflow.pictures import to_float
from lediflow.pipelines.base import ImagePipeline
from lediflow.pipelines.load import load_pipeline
from lediflow.training.config import Config, load_run_config
from lediflow.training.inputs import open_data
from lediflow.training.run_pipelines import (
    keep_strengths,
    kept_strengths,
    load_network,
    pipeline_stages,
    trained_stages,
    write_pipelines,
)
from lediflow.training.stages import check_stage

VALUES = 5  # evenly spaced on the learned range; then two more beside the best
IMAGES = 512  # of each value
REAL = 4096  # at most
SEED = 1  # not that of an evaluation


def find_strengths(run: str | Path, device: str | None = None) -> dict[str, dict[str, float]]:
    """Find the best strengths of the run's pipelines that have learned some, and make them the default.

    What was found for the same networks before stays.

    Args:
        run: run folder.
        device: "cpu", "cuda" or "mps"; None for the best there is.

    Returns:
        by pipeline folder below the run, the strength of each guidance.
    """
    run, where = Path(run), check_device(device)
    config, found = load_run_config(run), {}
    for folder, (_, stages) in pipeline_stages(run, config).items():
        learned = any(config.strengths(check_stage(stage)) for stage in stages.values())
        if learned and not kept_strengths(run, folder, stages):
            if "auxiliary" not in trained_stages(run):
                said = "the best strengths are not searched for: images are compared by stage auxiliary"
                print(f"{folder}: {said}, which is not trained", file=sys.stderr)
                continue
            pipeline = load_pipeline(run / folder / "pipeline").to(where)
            found[folder] = _search(run, config, pipeline, folder)
            keep_strengths(run, folder, stages, found[folder])
    if found:
        names = load_pipeline(run / next(iter(found)) / "pipeline").config["id2label"]
        write_pipelines(run, config, names)
    return found


def _search(run: Path, config: Config, pipeline: ImagePipeline, folder: str) -> dict[str, float]:
    """Choose one strength after the other, each with those before it at their best."""
    pipeline.set_progress_bar_config(disable=True)
    auxiliary = load_network(run, "auxiliary", config).to(pipeline.device)
    real = Moments.of(_features(auxiliary, _real(config, pipeline.sample_shape)))
    best: dict[str, float] = {}
    told: dict[str, Any] = {}
    if pipeline.reader is not None:
        texts = texts_of(str(config.data.train), config.text.columns)
        told["prompt"] = drawn_prompts(texts, range(IMAGES), SEED)
    for name, strength in sorted(pipeline.strengths().items(), reverse=True):  # latent ones first
        if strength.learned is None:
            continue
        low, high = strength.learned
        gap = (high - low) / (VALUES - 1)
        scores: dict[float, float] = {}

        def score(value: float, name: str = name, scores: dict[float, float] = scores) -> None:
            value = round(value, 4)
            if value not in scores:
                scores[value] = frechet_distance(
                    Moments.of(_features(auxiliary, _made(pipeline, **told, **best, **{name: value}))), real
                )

        for i in range(VALUES):
            score(low + i * gap)
        middle = min(scores, key=scores.__getitem__)
        for value in (middle - gap / 2, middle + gap / 2):
            if low <= value <= high:
                score(value)
        best[name] = min(scores, key=scores.__getitem__)
        listed = ", ".join(f"{value:g}: {scores[value]:.3g}" for value in sorted(scores))
        print(f"{folder}: {name} {best[name]:g} is best ({listed})", file=sys.stderr, flush=True)
    return best


def _made(pipeline: ImagePipeline, **asked: Any) -> Tensor:
    """Images of the pipeline as the encoder takes them: pixels, or normalised codec latents."""
    in_codec = bool(pipeline.config.codec_space)
    made = pipeline(IMAGES, seed=SEED, output_type="latent" if in_codec else "pt", **asked).images
    return CodecSpace.from_dict(pipeline.config.codec_space).normalize(made) if in_codec else made


def _real(config: Config, shape: tuple[int, int, int]) -> Tensor:
    """Real images (or normalised codec latents): held-out ones, or those of the training."""
    data = config.data
    if config.codec is None:
        held_out = (data.train, "validation") if data.validation is None else (data.validation, "train")
        try:
            images = RealImages(str(held_out[0]), held_out[1], shape, REAL)
            return to_float(images.pixels(range(len(images))))
        except UserError:
            pass
    return open_data(config).first(REAL)


@torch.no_grad()
def _features(auxiliary: AuxiliaryModel, images: Tensor) -> Tensor:
    """Mean and deviation of the encoder's last tokens over an image, (N, 2 * width)."""
    batches = images.split(256)
    return torch.cat([auxiliary.features(batch.to(auxiliary.device)).cpu() for batch in batches])
