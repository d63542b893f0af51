"""A run folder: its config, its stages in order, its pipeline and its model card.

RUN/config.yaml             every setting, as resolved
RUN/<stage>/                checkpoints/step-N/, metrics.jsonl, previews/
RUN/latent_space.json       codec and scale of the latents, where it trains on latents
RUN/broken-images.txt       the images that were left out, and why
RUN/logs/<stage>/           TensorBoard
RUN/pipeline/               what LeDiFlowPipeline.from_pretrained loads, of the most refined stages there are
RUN/flow/pipeline/          the same before refinement, once something is refined
RUN/distill/pipeline/       with the flow of `distill`, where there is one
RUN/baseline/pipeline/      what FlowMatchingPipeline.from_pretrained loads
RUN/baseline-meanflow/pipeline/
RUN/averages/NAME/          the same two with a further average of the weights, for each in training.ema
RUN/README.md               model card
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lediflow.data.batches import TrainingData
from lediflow.errors import UserError, nearest
from lediflow.files import explained, write_folder, write_text
from lediflow.pipelines.flow_matching import FlowMatchingPipeline
from lediflow.pipelines.lediflow import LeDiFlowPipeline
from lediflow.precision import settle_precision
from lediflow.training import checkpoint
from lediflow.training.builders import BUILDERS
from lediflow.training.config import Config, differences, load_config
from lediflow.training.inputs import (
    describe,
    keep_latent_space,
    latent_space,
    open_data,
    refuse_other_latents,
    report_broken,
)
from lediflow.training.processes import check_device, make_accelerator, on_main
from lediflow.training.refine import DistillStage, build_stage
from lediflow.training.stage_config import NEEDS_LATENTS, STAGES, TEACHERS, StageName
from lediflow.training.stages import Latents
from lediflow.training.trackers import check_tracker, start_tracker, stop_tracker
from lediflow.training.trainer import Interrupted, check_batches, fit


def train(
    config: Config,
    output: str | Path,
    *,
    stages: Iterable[str] | None = None,
    device: str | None = None,
    resume: bool = True,
) -> Path:
    """Train the stages of a run in their order and write its pipelines; return the run folder.

    Args:
        config: every setting.
        output: run folder; where it holds the same run already, each stage goes on from its last checkpoint.
        stages: which stages; None for those of `training.stages`. What a stage needs must be trained now or
            earlier: `flow` and `sampler` need `auxiliary`; `meanflow` and `distill` need `flow`;
            `sampler-meanflow` and `baseline-meanflow` need the stage they are named for.
        device: "cpu", "cuda" or "mps"; None for the best there is.
        resume: False moves each of the stages' earlier folders aside and trains it again.

    Raises:
        UserError: an impossible config, unreadable data, another run in `output`, an unknown stage or device.
        Interrupted: after SIGINT or SIGTERM, with the state saved.
    """
    run, chosen = Path(output), _in_order(config.training.stages if stages is None else stages)
    check_networks(config)
    check_device(device)
    check_tracker(config)
    tracker = config.training.tracker
    accelerator = make_accelerator(
        config.training, device, log_with=None if tracker == "none" else tracker, project_dir=run / "logs"
    )
    check_batches(config, chosen, accelerator.num_processes)
    _check_derivatives(config, chosen, accelerator.num_processes)
    _refuse_another_run(run, config, chosen, resume)
    if not accelerator.is_main_process:
        warnings.simplefilter("ignore", UserWarning)  # the main process says it
    data = open_data(config)
    if resume:
        refuse_other_latents(run, data)
    on_main(accelerator, lambda: _claim(run, config, data, chosen, resume))
    if accelerator.is_main_process:
        _say(f"{describe(data, config)}; run folder {run}")
        if config.training.precision == "auto":
            _say(f"training.precision=auto: {settle_precision('auto', accelerator.device)}")
        if (count := accelerator.num_processes) > 1:
            _say(f"{count} processes ({config.training.parallel}) on {accelerator.device.type}")
    try:
        _train_stages(config, run, chosen, data, accelerator, resume=resume)
    except Interrupted:
        accelerator.end_training()
        raise
    accelerator.end_training()
    return run


def _train_stages(
    config: Config,
    run: Path,
    chosen: list[StageName],
    data: TrainingData,
    accelerator: Accelerator,
    *,
    resume: bool,
) -> None:
    latents: Latents | None = None  # of the auxiliary stage, which comes first; several stages share them
    classes = data.class_names if config.data.classes else []
    for name in chosen:
        must_agree: dict[str, object] = {} if name == "auxiliary" else {"classes": classes}
        if name in NEEDS_LATENTS:
            if latents is None:
                with torch.no_grad(), accelerator.autocast():
                    latents = Latents(load_network(run, "auxiliary", config), data, accelerator.device)
            must_agree["auxiliary"] = checkpoint.digest(last_checkpoint(run, "auxiliary"))
        teacher = None
        if name in TEACHERS and not getattr(config.stage(name), "from_scratch", False):
            teacher = load_network(run, TEACHERS[name], config)
            must_agree[TEACHERS[name]] = checkpoint.digest(last_checkpoint(run, TEACHERS[name]))
        stage = build_stage(
            name, config, data, accelerator.device, latents if name in NEEDS_LATENTS else None, teacher
        )
        if isinstance(stage, DistillStage):
            _prepare_pairs(stage, run, must_agree, accelerator)
        start_tracker(accelerator, config, run, name)
        try:
            last = fit(stage, run / name, accelerator, must_agree=must_agree, resume=resume)
        finally:
            stop_tracker(accelerator)
        if accelerator.is_main_process:
            _say(f"{name}: done, {last}")
        on_main(accelerator, lambda: _conclude(run, config, data))


def _prepare_pairs(
    stage: DistillStage, run: Path, must_agree: dict[str, object], accelerator: Accelerator
) -> None:
    settings = {"pairs": stage.settings.pairs, "steps": stage.settings.teacher_steps}
    identity = json.dumps(must_agree | settings | {"seed": stage.config.training.seed}, sort_keys=True)
    with accelerator.autocast():
        stage.make_pairs(
            run / stage.name / "pairs",
            identity,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
    accelerator.wait_for_everyone()
    stage.load_pairs()


def _conclude(run: Path, config: Config, data: TrainingData) -> None:
    with explained(run):
        report_broken(run, data)
        write_pipelines(run, config, data.class_names if config.data.classes else ())


def check_networks(config: Config) -> dict[str, int]:
    """Build every network without memory and return its parameter count by stage name.

    Raises:
        UserError: sizes that do not fit each other, by name.
    """
    with torch.device("meta"):
        return {name: sum(p.numel() for p in build(config).parameters()) for name, build in BUILDERS.items()}


def last_checkpoint(run: Path, name: StageName) -> Path:
    """Return the folder of a stage's last checkpoint.

    Raises:
        UserError: the stage has none yet.
    """
    folder = run / name / "checkpoints"
    steps = checkpoint.steps_on_disk(folder)
    if not steps:
        raise UserError(
            f"{run} has no trained {name} stage yet; run `lediflow train ... --stage {name}` first"
        )
    return folder / f"step-{steps[-1]}"


def load_network(run: Path, name: StageName, config: Config, average: str = "ema"):
    """Return a stage's network with its averaged weights, in evaluation mode.

    Args:
        run: run folder.
        name: of the stage.
        config: of the run.
        average: "ema" for the first average, "ema-NAME" for another.

    Raises:
        UserError: no checkpoint, a damaged one, or one of another size.
    """
    folder = last_checkpoint(run, name)
    network = BUILDERS[name](config)
    try:
        network.load_state_dict(checkpoint.load_tensors(folder, f"{average}.safetensors"))
    except RuntimeError as error:
        raise UserError(f"{folder} does not fit the config: {str(error).splitlines()[-1].strip()}") from None
    return network.eval().requires_grad_(False)


def write_pipelines(run: Path, config: Config, class_names: Sequence[str] = ()) -> None:
    """Write what `from_pretrained` loads, for as many stages as are trained and for every average."""
    _write_pipelines(run, config, class_names, run, "ema")
    for other in config.training.ema[1:]:
        _write_pipelines(run, config, class_names, run / "averages" / other.name, f"ema-{other.name}")
    write_text(run / "README.md", _model_card(run, config))


def _write_pipelines(
    run: Path, config: Config, class_names: Sequence[str], target: Path, average: str
) -> None:
    trained = {name for name in STAGES if checkpoint.steps_on_disk(run / name / "checkpoints")}
    common: dict[str, Any] = {
        "latent_space": latent_space(run),
        "id2label": {str(i): name for i, name in enumerate(class_names)} or None,
    }
    for folder, stages in _variants(run, trained).items():
        networks = {
            # flow and sampler were trained with the first average of the auxiliary model
            part: load_network(run, stage, config, "ema" if stage == "auxiliary" else average)
            for part, stage in stages.items()
        }
        kind: Any = LeDiFlowPipeline if "auxiliary" in stages else FlowMatchingPipeline
        pipeline = kind(**networks, **common)
        write_folder(target / folder / "pipeline", pipeline.save_pretrained)


def _variants(run: Path, trained: set[StageName]) -> dict[str, dict[str, StageName]]:
    """Return the pipelines that a run can have: folder -> part of the pipeline -> stage that trained it."""
    variants: dict[str, dict[str, StageName]] = {
        name: {"flow": name} for name in ("baseline", "baseline-meanflow") if name in trained
    }
    fits = [name for name in NEEDS_LATENTS if name in trained and _same_auxiliary(run, name)]

    def first(*names: StageName) -> StageName | None:
        return next((name for name in names if name in fits), None)

    flow, sampler = first("meanflow", "distill", "flow"), first("sampler-meanflow", "sampler")
    if flow and sampler:
        best: dict[str, StageName] = {"auxiliary": "auxiliary", "flow": flow, "sampler": sampler}
        variants["."] = best
        if "distill" in fits and flow != "distill":
            variants["distill"] = best | {"flow": "distill"}
        if {"flow", "sampler"} <= set(fits) and (flow, sampler) != ("flow", "sampler"):
            variants["flow"] = best | {"flow": "flow", "sampler": "sampler"}
    return variants


def summary(run: Path, config: Config) -> str:
    """Return what was trained, a line per stage, and a command to type next for each pipeline."""
    lines = [f"run folder: {run}"]
    for name in STAGES:
        path = run / name / "metrics.jsonl"
        records = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if records:
            last = json.loads(records[-1])
            loss = "no finite loss" if last["loss"] is None else f"loss {last['loss']:.4f}"
            skipped = f", {last['skipped']} steps skipped" if last["skipped"] else ""
            lines.append(
                f"  {name}: {last['step']} steps, {loss}, {last['images_per_second']:.0f} images/s{skipped}"
            )
    guided = " --guidance 1.5" if config.data.classes else ""
    for folder in (".", "distill", "baseline", "baseline-meanflow"):
        model = run / folder
        if (model / "pipeline").is_dir():
            lines.append(f"next: lediflow sample {model} -n 64{guided} --output {model / 'samples'}")
    return "\n".join(lines)


def _same_auxiliary(run: Path, name: StageName) -> bool:
    """Whether a stage was trained on the auxiliary model that is there now."""
    saved = checkpoint.load_state(last_checkpoint(run, name))
    return bool(saved.get("auxiliary") == checkpoint.digest(last_checkpoint(run, "auxiliary")))


def _in_order(stages: Iterable[str]) -> list[StageName]:
    wanted = list(stages)
    for name in wanted:
        if name not in STAGES:
            raise UserError(f"unknown stage {name!r}{nearest(name, STAGES)}; choose from {', '.join(STAGES)}")
    return [name for name in STAGES if name in wanted]


def _check_derivatives(config: Config, chosen: list[StageName], processes: int) -> None:
    """Raise UserError where a derivative in forward mode would have to cross shards of weights."""
    sharded = processes > 1 and config.training.parallel == "fsdp"
    wrong = [name for name in chosen if name.endswith("meanflow")]
    if sharded and wrong:
        raise UserError(
            f"stage {wrong[0]} does not work with training.parallel=fsdp; use ddp, or the stage distill"
        )


def _refuse_another_run(run: Path, config: Config, chosen: list[StageName], resume: bool) -> None:
    """Raise UserError where the run folder holds trained stages of another config."""
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file, not a run folder; choose another --output")
    path = run / "config.yaml"
    if not path.exists() or not any(checkpoint.steps_on_disk(run / name / "checkpoints") for name in STAGES):
        return
    changed = differences(load_config(path), config)
    if changed and resume:
        listed = "; ".join(f"{key}: {old} there, {new} now" for key, (old, new) in changed.items())
        raise UserError(
            f"{run} holds a run of another config ({listed}); choose another --output, or --no-resume"
        )
    kept = [n for n in STAGES if checkpoint.steps_on_disk(run / n / "checkpoints") and n not in chosen]
    if changed and kept:
        raise UserError(
            f"{run}: with another config, --no-resume must train all stages that are there again; "
            f"missing: {', '.join(kept)}"
        )


def _claim(run: Path, config: Config, data: TrainingData, chosen: list[StageName], resume: bool) -> None:
    """Make the run folder this config's; the stages' earlier folders move aside unless they are resumed."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        if not resume:
            for name in chosen:
                _move_aside(run / name)
        write_text(run / "config.yaml", config.to_yaml())
        keep_latent_space(run, data)
    except OSError as error:
        raise UserError(f"cannot write to {run}: {error}; choose another --output") from None


def _move_aside(folder: Path) -> None:
    if not folder.exists():
        return
    n = 1
    while (old := folder.with_name(f"{folder.name}.old-{n}")).exists():
        n += 1
    folder.rename(old)


def _model_card(run: Path, config: Config) -> str:
    counts = check_networks(config)
    rows = []
    for name in STAGES:
        if steps := checkpoint.steps_on_disk(run / name / "checkpoints"):
            images = steps[-1] * config.stage(name).batch_size
            rows.append(f"| {name} | {counts[name] / 1e6:.2f} M | {steps[-1]} | {images:,} |")
    return f"""---
library_name: lediflow
pipeline_tag: unconditional-image-generation
---
# {run.resolve().name}

{config.description}

An image generator trained with lediflow on `{config.data.train}` at {config.data.image_size} px,
{"RGB" if config.data.channels == 3 else "grey"}. The pictures it makes carry the content, the biases and the
licence terms of that data: check them before you share this folder.

| network | parameters | steps | images seen |
| --- | --- | --- | --- |
{chr(10).join(rows)}

```python
from lediflow import LeDiFlowPipeline

pipe = LeDiFlowPipeline.from_pretrained("pipeline")
images = pipe(num_images=16, steps=2, seed=0).images
```

Every setting is in `config.yaml`.
{_measured(config)}"""


def _measured(config: Config) -> str:
    return f"What these settings gave when they were measured: {config.measured}\n" if config.measured else ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
