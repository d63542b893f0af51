"""Train the stages of a run in their order.

RUN/config.yaml             every setting, as resolved
RUN/<stage>/                checkpoints/step-N/, metrics.jsonl, previews/
RUN/codec_space.json       codec and scale of the codec latents, where it trains on these
RUN/dataset.json            the commit of a Hub data set
RUN/broken-images.txt       the images that were left out, and why
RUN/text_encoder.json       where the frozen encoder of texts was, and its fingerprint
RUN/logs/<stage>/           TensorBoard
RUN/pipeline/ and others    what `from_pretrained` loads (run_pipelines.py)
RUN/README.md               model card (card.py)
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from lediflow.data.batches import TrainingData
from lediflow.devices import check_device, load_words, settle_precision
from lediflow.errors import UserError
from lediflow.files import clear_files, explained, settle, write_text
from lediflow.training import checkpoint
from lediflow.training.builders import OBJECTIVES, build_stage, count_parameters
from lediflow.training.card import write_card
from lediflow.training.clusters import settle_clusters
from lediflow.training.config import Config, check_sections, differences, load_run_config
from lediflow.training.couplings import Context
from lediflow.training.early import check_early, check_left_behind, early_average, is_early
from lediflow.training.inputs import (
    describe,
    keep_codec_space,
    keep_dataset,
    open_data,
    refuse_other_latents,
    report_broken,
    taught_classes,
)
from lediflow.training.processes import make_accelerator, on_main
from lediflow.training.run_pipelines import (
    check_finished,
    last_checkpoint,
    load_network,
    trained_stages,
    write_pipelines,
)
from lediflow.training.solving import solve
from lediflow.training.stages import StageSpec, in_order
from lediflow.training.teacher import check_strengths
from lediflow.training.texts import EncodedTexts, FrozenEncoder, settle_text
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
        config: every setting, from `load_config`.
        output: run folder; where it holds the same run already, each stage resumes from its last checkpoint.
        stages: which stages; None for those of `training.stages`. What a stage relies on (the table in
            stages.py) must be trained now or earlier; `clusters` are found along where they are missing.
        device: "cpu", "cuda" or "mps"; None for the best there is.
        resume: False moves each of the stages' earlier folders aside and trains it again.

    Raises:
        UserError: an impossible config, unreadable data, another run in `output`, an unknown stage or device.
        Interrupted: after SIGINT or SIGTERM, with the state saved.
    """
    run, chosen = Path(output), config.chosen(stages)
    check_sections(config, chosen)
    check_strengths(config, chosen)
    check_early(config, chosen)
    count_parameters(config)
    check_device(device)
    check_tracker(config)
    tracker = config.training.tracker
    accelerator = make_accelerator(
        config.training, device, log_with=None if tracker == "none" else tracker, project_dir=run / "logs"
    )
    check_batches(config, chosen, accelerator.num_processes)
    check_shards(config, chosen, accelerator.num_processes)
    if not accelerator.is_main_process:
        warnings.simplefilter("ignore", UserWarning)  # the main process says it
    data = open_data(config, run if resume else None)
    config, encoder = settle_text(settle_clusters(config, data), accelerator)
    _refuse_another_run(run, config, chosen, resume)
    chosen = _completed(run, config, chosen)
    check_left_behind(config, run, chosen, resume)
    if resume:
        refuse_other_latents(run, data)
        if encoder is not None:
            on_main(accelerator, lambda: encoder.refuse_another(run))
    on_main(accelerator, lambda: _claim(run, config, data, chosen, resume, encoder))
    if accelerator.is_main_process:
        _say(f"{describe(data, config)}; run folder {run}")
        if config.training.precision == "auto":
            _say(f"training.precision=auto: {settle_precision('auto', accelerator.device)}")
        if busy := load_words():
            _say(f"{busy}, so training will take longer")
        if (count := accelerator.num_processes) > 1:
            _say(f"{count} processes ({config.training.parallel}) on {accelerator.device.type}")
    texts = None
    if encoder is not None:
        if any(config.text.told(spec.network) for spec in chosen):
            texts = encoder.encode(config, data.texts, accelerator)
        encoder.model = None  # its memory is wanted
    try:
        _train_stages(config, run, chosen, data, texts, accelerator, resume=resume)
    except Interrupted as stop:
        if accelerator.is_main_process:
            _say(f"{stop}; the same command resumes")
        accelerator.wait_for_everyone()  # a launcher ends the others as soon as one has left
        accelerator.end_training()
        raise
    accelerator.end_training()
    return run


def _train_stages(
    config: Config,
    run: Path,
    chosen: list[StageSpec],
    data: TrainingData,
    texts: EncodedTexts | None,
    accelerator: Accelerator,
    *,
    resume: bool,
) -> None:
    context = Context(config, data, accelerator.device, lambda name: load_network(run, name, config), texts)
    for spec in chosen:
        identity = _identity(spec, config, run)
        with torch.no_grad(), accelerator.autocast():
            stage = build_stage(spec.name, context)
        stage.prepare(run / spec.name, identity, accelerator)
        classes = data.class_names if config.data.classes else []
        must_agree = {"classes": classes, **identity} if stage.coupling.tells_labels else identity
        start_tracker(accelerator, config, run, spec.name)
        try:
            learn = partial(fit, early=early_average(spec, config, run)) if stage.by_gradients else solve
            kept = resume or is_early(spec, config)  # what this training may just have left behind
            last = learn(stage, run / spec.name, accelerator, must_agree=must_agree, resume=kept)
        finally:
            stop_tracker(accelerator)
        if accelerator.is_main_process:
            _say(f"{spec.name}: done, {last}")
        on_main(accelerator, lambda: _conclude(run, config, data))


def _completed(run: Path, config: Config, chosen: list[StageSpec]) -> list[StageSpec]:
    """Return the stages, with `clusters` where one is told them and nobody has found them: it takes seconds.

    Raises:
        UserError: another stage that one relies on is neither among them nor trained; before any is trained.
    """

    def missing(stages: list[StageSpec]) -> set[str]:
        return {name for spec in stages for name in config.relies_on(spec)} - {spec.name for spec in stages}

    if "clusters" in missing(chosen) and not checkpoint.steps_on_disk(run / "clusters" / "checkpoints"):
        chosen = in_order(["clusters", *(spec.name for spec in chosen)])
    for name in missing(chosen):
        check_finished(run, name)
    return chosen


def _identity(spec: StageSpec, config: Config, run: Path) -> dict[str, object]:
    """Return a digest of each network that a stage relies on; all must be finished."""
    relies_on = config.relies_on(spec)
    for name in relies_on:
        check_finished(run, name)
    return {name: checkpoint.digest(last_checkpoint(run, name)) for name in relies_on}


def _conclude(run: Path, config: Config, data: TrainingData) -> None:
    with explained(run):
        report_broken(run, data)
        write_pipelines(run, config, taught_classes(data) if config.data.classes else None)
        write_card(run, config, data.commit)


def check_shards(config: Config, chosen: list[StageSpec], processes: int) -> None:
    """Refuse shards of weights for a stage whose loss cannot be computed with them.

    Raises:
        UserError: naming the stage.
    """
    if processes < 2 or config.training.parallel != "fsdp":
        return
    for spec in chosen:
        if not OBJECTIVES[spec.objective].works_sharded:
            raise UserError(
                f"stage {spec.name} does not work with training.parallel=fsdp; use ddp, or the stage distill"
            )


def _refuse_another_run(run: Path, config: Config, chosen: list[StageSpec], resume: bool) -> None:
    """Raise UserError where the run folder holds trained stages of another config."""
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file, not a run folder; choose another --output")
    trained = trained_stages(run)
    if not (run / "config.yaml").exists() or not trained:
        return
    changed = differences(load_run_config(run), config)
    if changed and resume:
        listed = "; ".join(f"{key}: {old} there, {new} now" for key, (old, new) in changed.items())
        raise UserError(
            f"{run} holds a run of another config ({listed}); choose another --output, or --no-resume"
        )
    kept = [name for name in trained if name not in {spec.name for spec in chosen}]
    if changed and kept:
        raise UserError(
            f"{run}: with another config, --no-resume must train all stages that are there again; "
            f"missing: {', '.join(kept)}"
        )


def _claim(
    run: Path,
    config: Config,
    data: TrainingData,
    chosen: list[StageSpec],
    resume: bool,
    encoder: FrozenEncoder | None,
) -> None:
    """Make the run folder this config's; the stages' earlier folders move aside unless they are resumed."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        clear_files(run)
        settle(run / "pipeline")
        if not resume:
            for spec in chosen:
                _move_aside(run / spec.name)
        write_text(run / "config.yaml", config.to_yaml())
        keep_codec_space(run, data)
        keep_dataset(run, config, data)
        if encoder is not None:
            encoder.keep(run)
    except OSError as error:
        raise UserError(f"cannot write to {run}: {error}; choose another --output") from None


def _move_aside(folder: Path) -> None:
    if not folder.exists():
        return
    n = 1
    while (old := folder.with_name(f"{folder.name}.old-{n}")).exists():
        n += 1
    folder.rename(old)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
