"""The table of pipelines that a run can have, and how they are written from its trained stages.

RUN/pipeline/                    what `from_pretrained` loads: the most refined stages there are
RUN/flow/pipeline/               the same, unrefined, once something is refined
RUN/meanflow/pipeline/           with the flow of `meanflow`, where `meanflow-distill` is there too
RUN/distill/pipeline/            with the flow of `distill`, where `meanflow` is there too
RUN/baseline/pipeline/           plain flow matching
RUN/baseline-meanflow/pipeline/  the same in one evaluation
RUN/upsampler.../pipeline/       the coupling flow unrefined, from a learned start, and from noise; the best
                                 is RUN/pipeline where there is no generator
RUN/averages/NAME/               all of them with a further average of the weights, for each in training.ema
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lediflow.errors import UserError
from lediflow.files import read_json, write_folder, write_text
from lediflow.pipelines.load import PIPELINES
from lediflow.training import checkpoint
from lediflow.training.builders import OBJECTIVES, build_network
from lediflow.training.config import Config
from lediflow.training.inputs import codec_space
from lediflow.training.stages import STAGES, check_stage
from lediflow.training.texts import kept_encoder
from lediflow.upsampling import MAX_NOISE_LEVEL

STRENGTHS = "strengths.json"  # in the run folder: the best strengths of guidance that were found


@dataclass(frozen=True)
class RunPipeline:
    """One pipeline that a run can have.

    Attributes:
        folder: below the run.
        kind: name of the class, in `pipelines.load.PIPELINES`.
        parts: for each network of the pipeline the stages that may have trained it, the best first.
        weak: likewise, worse networks for autoguidance, by the part that each guides. They come along where
            they are trained and that part has not learned its guidance.
        noise_level: at which an upsampler starts; None for that of the config.
    """

    folder: str
    kind: str
    parts: Mapping[str, tuple[str, ...]]
    weak: Mapping[str, str] = field(default_factory=dict)
    noise_level: int | None = None


LEDIFLOW, UPSAMPLE = "LeDiFlowPipeline", "FlowUpsamplePipeline"
PRIOR = {"auxiliary": ("auxiliary",)}
SAMPLER = {"sampler": ("sampler-meanflow", "sampler")}
WEAK = {"flow": "weak-flow", "sampler": "weak-sampler"}
WEAK_BASELINE = {"flow": "weak-baseline"}
RUN_PIPELINES = [
    RunPipeline(
        ".",
        LEDIFLOW,
        {**PRIOR, "flow": ("meanflow-distill", "meanflow", "distill", "flow"), **SAMPLER},
        WEAK,
    ),
    RunPipeline("meanflow", LEDIFLOW, {**PRIOR, "flow": ("meanflow",), **SAMPLER}, WEAK),
    RunPipeline("distill", LEDIFLOW, {**PRIOR, "flow": ("distill",), **SAMPLER}, WEAK),
    RunPipeline("flow", LEDIFLOW, {**PRIOR, "flow": ("flow",), "sampler": ("sampler",)}, WEAK),
    RunPipeline("baseline", "FlowMatchingPipeline", {"flow": ("baseline",)}, WEAK_BASELINE),
    RunPipeline("baseline-meanflow", "FlowMatchingPipeline", {"flow": ("baseline-meanflow",)}, WEAK_BASELINE),
    RunPipeline(".", UPSAMPLE, {"flow": ("upsampler-meanflow", "upsampler")}),
    RunPipeline("upsampler", UPSAMPLE, {"flow": ("upsampler",)}),
    RunPipeline(
        "upsampler-learned",
        UPSAMPLE,
        {"flow": ("upsampler-learned-meanflow", "upsampler-learned"), "prior": ("upsampler-prior",)},
        noise_level=0,
    ),
    RunPipeline(
        "upsampler-gaussian", UPSAMPLE, {"flow": ("upsampler-gaussian",)}, noise_level=MAX_NOISE_LEVEL
    ),
]


def last_checkpoint(run: Path, name: str) -> Path:
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


def check_finished(run: Path, name: str) -> None:
    """Refuse to build on a stage that was interrupted.

    Raises:
        UserError: it has no checkpoint, or its last one is not that of its end.
    """
    folder = last_checkpoint(run, name)
    if not checkpoint.load_state(folder)["finished"]:
        raise UserError(
            f"{run}: stage {name} is not finished ({folder.name}); run "
            f"`lediflow train ... --stage {name}` first"
        )


def load_network(run: Path, name: str, config: Config, average: str = "ema") -> Any:
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
    network = build_network(check_stage(name), config)
    try:
        network.load_state_dict(checkpoint.load_tensors(folder, f"{average}.safetensors"))
    except RuntimeError as error:
        raise UserError(f"{folder} does not fit the config: {str(error).splitlines()[-1].strip()}") from None
    return network.eval().requires_grad_(False)


def finished_stages(run: Path) -> list[str]:
    """Return the stages that were trained to their end, in the order of training."""
    return [
        name for name in trained_stages(run) if checkpoint.load_state(last_checkpoint(run, name))["finished"]
    ]


def trained_stages(run: Path) -> list[str]:
    """Return the stages that have a checkpoint, in the order of training."""
    return [name for name in STAGES if checkpoint.steps_on_disk(run / name / "checkpoints")]


def write_pipelines(run: Path, config: Config, class_names: Mapping[str, str] | None = None) -> None:
    """Write every pipeline that the trained stages make, with every average of the weights.

    Args:
        run: run folder.
        config: of the run.
        class_names: names of the classes that can be asked for, by index; None for a run without classes.
    """
    _write(run, config, class_names, run, "ema")
    for other in config.training.ema[1:]:
        _write(run, config, class_names, run / "averages" / other.name, f"ema-{other.name}")


def pipeline_stages(run: Path, config: Config) -> dict[str, tuple[RunPipeline, dict[str, str]]]:
    """Return the pipelines that a run can have now: folder -> row, and the stage that trained each part.

    A row whose stages or folder are those of an earlier row is left out.
    """
    usable = [name for name in finished_stages(run) if _agrees(run, name, config)]
    found: dict[str, tuple[RunPipeline, dict[str, str]]] = {}
    for row in RUN_PIPELINES:
        chosen = {
            part: next((name for name in candidates if name in usable), "")
            for part, candidates in row.parts.items()
        }
        if not all(chosen.values()):
            continue
        if any(config.clusters.told(STAGES[name].network) for name in chosen.values()):
            chosen["clusters"] = "clusters"
        for part, weak in row.weak.items():
            if weak in usable and not OBJECTIVES[STAGES[chosen[part]].objective].average_velocity:
                chosen[f"weak_{part}"] = weak
        if row.folder not in found and not any(chosen == stages for _, stages in found.values()):
            found[row.folder] = row, chosen
    return found


def keep_strengths(run: Path, folder: str, stages: Mapping[str, str], strengths: dict[str, float]) -> None:
    """Keep the best strengths of guidance that were found for a pipeline, in RUN/strengths.json."""
    kept = _all_strengths(run) | {folder: {"networks": _digests(run, stages), "strengths": strengths}}
    write_text(run / STRENGTHS, json.dumps(kept, indent=1))


def kept_strengths(run: Path, folder: str, stages: Mapping[str, str]) -> dict[str, float]:
    """Return the best strengths that were found for a pipeline of these stages; nothing for another."""
    found = _all_strengths(run).get(folder, {})
    strengths: dict[str, float] = found.get("strengths", {})
    return strengths if strengths and found["networks"] == _digests(run, stages) else {}


def _all_strengths(run: Path) -> dict[str, Any]:
    return (
        read_json(run / STRENGTHS, f"delete it, and `lediflow train {run}` finds the strengths again") or {}
    )


def _digests(run: Path, stages: Mapping[str, str]) -> dict[str, Any]:
    return {part: checkpoint.digest(last_checkpoint(run, stage)) for part, stage in stages.items()}


def _agrees(run: Path, name: str, config: Config) -> bool:
    """Whether a stage was trained with those networks that are there now."""
    needs = config.uses(STAGES[name])
    if not needs:
        return True
    saved = checkpoint.load_state(last_checkpoint(run, name))
    return all(saved.get(need) == checkpoint.digest(last_checkpoint(run, need)) for need in needs)


def _write(
    run: Path, config: Config, class_names: Mapping[str, str] | None, target: Path, average: str
) -> None:
    for folder, (row, stages) in pipeline_stages(run, config).items():
        needed = {need for stage in stages.values() for need in config.uses(STAGES[stage])}
        networks = {
            # what other stages were trained with has the first average, as it had then
            part: load_network(run, stage, config, "ema" if stage in needed else average)
            for part, stage in stages.items()
        }
        settings = _settings(row, config, class_names)
        strengths = kept_strengths(run, folder, stages)
        if row.kind == LEDIFLOW and config.temperature != 1:
            strengths = {"temperature": config.temperature, **strengths}
        if strengths:
            settings["strengths"] = strengths
        if config.text.frozen and any(config.text.told(STAGES[name].network) for name in stages.values()):
            settings["prompt_encoder"] = kept_encoder(run)
        pipeline: Any = PIPELINES[row.kind](**networks, codec_space=codec_space(run), **settings)
        write_folder(target / folder / "pipeline", pipeline.save_pretrained)


def _settings(row: RunPipeline, config: Config, class_names: Mapping[str, str] | None) -> dict[str, Any]:
    """What a pipeline is told besides its networks and its codec."""
    if row.kind != UPSAMPLE:
        return {"id2label": dict(class_names) if class_names else None}
    upsampler = config.section("upsampler")
    level = sum(upsampler.noise_levels) // 2 if row.noise_level is None else row.noise_level
    return {"scale": upsampler.scale, "enlarge": upsampler.enlarge, "noise_level": level}
