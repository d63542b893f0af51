"""What a run says of itself: its model card, and what was trained, for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lediflow.files import read_records, write_text
from lediflow.training import checkpoint
from lediflow.training.builders import count_parameters
from lediflow.training.config import Config
from lediflow.training.run_pipelines import UPSAMPLE, pipeline_stages, trained_stages
from lediflow.training.stages import STAGES
from lediflow.training.texts import kept_encoder


def write_card(run: Path, config: Config, commit: str = "") -> None:
    """Write RUN/README.md, the model card; `commit` is that of a Hub data set."""
    write_text(run / "README.md", model_card(run, config, commit))


def run_report(run: Path, config: Config) -> dict[str, Any]:
    """Return what was trained, and a command to type next for each pipeline; plain values for JSON.

    Returns:
        {"run": folder, "stages": by name the last line of its metrics.jsonl, "next": commands}.
    """
    stages = {}
    for name in STAGES:
        path = run / name / "metrics.jsonl"
        records = read_records(path)
        if records:
            stages[name] = records[-1]
    guided = " --guidance 1.5" if config.data.classes else ""
    if config.text.encoder:
        guided = ' --prompt "words of your own"'
    commands = [
        f"lediflow upsample {run / folder} IMAGE --output {run / folder / 'large'}"
        if row.kind == UPSAMPLE
        else f"lediflow sample {run / folder} -n 64{guided} --output {run / folder / 'samples'}"
        for folder, (row, _) in pipeline_stages(run, config).items()
        if (run / folder / "pipeline").is_dir()
    ]
    return {"run": str(run), "stages": stages, "next": commands}


def summary(report: dict[str, Any]) -> str:
    """Return a `run_report` as text."""
    lines = [f"run folder: {report['run']}"]
    for name, last in report["stages"].items():
        loss = "no finite loss" if last["loss"] is None else f"loss {last['loss']:.4f}"
        skipped = f", {last['skipped']} steps skipped" if last["skipped"] else ""
        speed = f"{last['images_per_second'] or 0:.0f} images/s"
        lines.append(f"  {name}: {last['step']} steps, {loss}, {speed}{skipped}")
    return "\n".join([*lines, *(f"next: {command}" for command in report["next"])])


def model_card(
    run: Path,
    config: Config,
    commit: str = "",
    *,
    folder: str = "",
    name: str = "",
    licence: str = "",
    picture: str = "",
) -> str:
    """Return a model card: data, licence, use, risks, measured results.

    Args:
        run: run folder.
        config: of the run, or what of it may be told.
        commit: that of a Hub data set.
        folder: below the run, of the pipeline that is told; "" for the first that it has.
        name: what `from_pretrained` takes; "" for the pipeline's folder.
        licence: of the weights, an identifier such as "cc-by-4.0"; "" where nobody said one.
        picture: file of images that it made, beside the card.
    """
    trained, at = trained_stages(run), f" (commit `{commit}`)" if commit else ""
    counts, rows = count_parameters(config, trained), []
    for stage in trained:
        steps = checkpoint.steps_on_disk(run / stage / "checkpoints")[-1]
        images = steps * getattr(config.stage(stage), "batch_size", 0)
        rows.append(f"| {stage} | {counts[stage] / 1e6:.2f} M | {steps} | {images:,} |")
    pipelines = pipeline_stages(run, config)
    folder = folder or next(iter(pipelines), "")
    kind = pipelines[folder][0].kind if folder in pipelines else ""
    upsamples = kind == UPSAMPLE
    what = "An upsampler of images" if upsamples else "An image generator"
    head = [
        "library_name: lediflow",
        f"pipeline_tag: {'image-to-image' if upsamples else 'unconditional-image-generation'}",
        *([f"license: {licence}"] if licence else []),
        "tags: [flow-matching, image-generation, diffusers]",
    ]
    return f"""---
{chr(10).join(head)}
---
# {name.rpartition("/")[2] or run.resolve().name}

{config.description}

{what} trained with [lediflow](https://github.com/lediflow/lediflow) on `{config.data.train}`{at} at
{config.data.image_size} px, {"RGB" if config.data.channels == 3 else "grey"}.
{_picture(picture)}{_example(kind, folder, name)}
## Data and licence

The pictures it makes carry the content, the biases and the licence terms of its data: check them before you
share this folder. {_licence(licence)}

## Intended use

Pictures like those of its data; research and teaching on generation in few network evaluations. Nobody has
checked it for anything that a person, a product or a safety decision depends on.

## Risks and limits

- It knows its data alone, and shows their groups as often, and as one-sidedly, as the data do.
- A model of few pictures may repeat some of them. `lediflow evaluate` counts copies and shows the closest
  training pictures; do so before you share a model of private pictures.
- It has no filter and no watermark. Where its data show people, do not pass what it makes off as a photo of
  somebody.

## Training

| network | parameters | steps | images seen |
| --- | --- | --- | --- |
{chr(10).join(rows)}

Every setting is in `config.yaml`.{_words(run, config)}

## Measured

{_measured(run, config, kind)}
"""


def _picture(file: str) -> str:
    return f"\n![images that it made, none picked out]({file})\n" if file else ""


def _example(kind: str, folder: str, name: str) -> str:
    """How to make images with a pipeline, in its class and with its defaults."""
    if not kind:
        return ""
    path = name or ("pipeline" if folder == "." else f"{folder}/pipeline")
    call = 'image="small.png"' if kind == UPSAMPLE else "num_images=16, seed=0"
    return f"""
```python
from lediflow import {kind}

pipe = {kind}.from_pretrained("{path}")
images = pipe({call}).images
```
"""


def _licence(licence: str) -> str:
    if licence:
        return f"Licence of the weights: {licence}, as whoever shares them says."
    return "Nobody has said a licence of the weights."


def _words(run: Path, config: Config) -> str:
    """How the model reads prompts, if it does."""
    if config.text.encoder == "characters":
        return " Prompts are read by a small encoder that was trained along."
    record = kept_encoder(run) if config.text.encoder else None
    if record is None:
        return ""
    name, commit = Path(record["name"]), record["revision"]
    said = f"`{name.name if name.is_absolute() else name}`{f' (commit `{commit}`)' if commit else ''}"
    return (
        f"\n\nPrompts are read by the frozen text encoder {said}, which is no part of this folder. The "
        f"fingerprint of its weights and tokenizer is `{record['fingerprint']}`; another encoder is refused."
    )


def _measured(run: Path, config: Config, kind: str) -> str:
    """What was measured of this run, or what its preset says of such runs."""
    for name, paragraphs in (("table.md", None), ("evaluation/table.md", 2)):
        if (run / name).is_file():
            text = (run / name).read_text(encoding="utf-8").strip()
            return "\n\n".join(text.split("\n\n")[:paragraphs])
    if config.measured:
        return f"What these settings gave when they were measured: {config.measured}"
    return "Nothing yet." if kind == UPSAMPLE else "Nothing yet; `lediflow evaluate RUN --data IMAGES` does."
