"""`lediflow benchmark`: how fast a model or preset is on this machine."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from lediflow.choices import ATTENTION_BACKENDS
from lediflow.cli.options import (
    Device,
    Dtype,
    FlowSolver,
    Json,
    LatentSolver,
    LatentSteps,
    Set,
    Steps,
    completed,
)


def benchmark(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|PRESET", help="Run folder, saved pipeline, Hub id, or a preset.")
    ],
    solver: FlowSolver = None,
    steps: Steps = None,
    latent_solver: LatentSolver = None,
    latent_steps: LatentSteps = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 8,
    dtype: Dtype = "auto",
    repeats: Annotated[int, typer.Option(help="Timed repetitions; the median counts.")] = 3,
    attention: Annotated[
        str | None,
        typer.Option(
            help=f"Force a backend: {', '.join(ATTENTION_BACKENDS)}.",
            autocompletion=completed(ATTENTION_BACKENDS),
            show_default=False,
        ),
    ] = None,
    compile: Annotated[str, typer.Option(help="none, blocks, model or pipeline.")] = "none",
    average_velocity: Annotated[
        bool,
        typer.Option(
            "--average-velocity",
            help="Time a preset as refined to one evaluation; needless where its training.stages do it.",
        ),
    ] = False,
    codec: Annotated[
        str | None,
        typer.Option(
            help="Also time this autoencoder (folder or Hub id) on the latents.", show_default=False
        ),
    ] = None,
    settings: Set = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time a request as `lediflow sample` makes it: ms per image, by network, images per second, memory.

    A preset is timed with untrained weights, which take the same time. Stop other work first.

    Examples:

        lediflow benchmark runs/flowers

        lediflow benchmark ffhq-256-sdv --batch-size 8 --json

        lediflow benchmark flowers-64 --average-velocity

        lediflow benchmark ffhq-256 --steps 2 --latent-steps 4 --attention dense --set data.image_size=128
    """
    import os

    from lediflow.codecs import Codec
    from lediflow.devices import check_device, settle_precision
    from lediflow.errors import UserError, nearest
    from lediflow.evaluation.speed import benchmark as run_benchmark
    from lediflow.evaluation.speed import pipeline_of
    from lediflow.networks.attention import VARIABLE, check_backend

    known = ("none", "blocks", "model", "pipeline")
    if compile not in known:
        raise UserError(
            f"unknown compile {compile!r}{nearest(compile, known)}; choose from {', '.join(known)}"
        )
    if min(batch_size, repeats) < 1:
        raise UserError("--batch-size and --repeats must be at least 1")
    if attention is not None:
        check_backend(attention)
        os.environ[VARIABLE] = attention
    where = check_device(device)
    dtype = settle_precision(dtype, where)
    if not as_json:
        print(f"timing {model} on {where}", file=sys.stderr)
    report = {
        "model": model,
        **run_benchmark(
            pipeline_of(model, settings, average_velocity=average_velocity),
            device=where,
            solver=solver,
            steps=steps,
            latent_solver=latent_solver,
            latent_steps=latent_steps,
            codec=Codec.load(codec) if codec else None,
            dtype=dtype,
            batch_size=batch_size,
            repeats=repeats,
            compile=compile,  # type: ignore[arg-type]  # checked above
        ),
    }
    print(json.dumps(report, indent=1) if as_json else _text(report))


def _text(report: dict[str, Any]) -> str:
    from lediflow.evaluation.request import latent_words
    from lediflow.evaluation.tables import markdown_table
    from lediflow.ode import in_words

    ms = report["ms_per_image"]
    backends = ", ".join(f"{grid} {name}" for grid, name in report["attention"].items())
    latent = f", latent sampler {words}" if (words := latent_words(report)) else ""
    rows = [
        [
            name,
            f"{report['networks'][name]:,}",
            count,
            *([ms[name], f"{ms[name] / ms['total']:.0%}"] if name in ms else ["", ""]),
        ]
        for name, count in report["nfe"].items()
    ]
    if "other" in ms:
        rows.append(["other", "", "", ms["other"], f"{ms['other'] / ms['total']:.0%}"])
    if "codec" in report:
        one = report["codec"]
        rows.append(["codec, not in the total", f"{one['parameters']:,}", 1, one["ms_per_image"], ""])
    return "\n".join(
        [
            f"{report['device']}, {report['threads']} threads, {report['dtype']}, "
            f"batch {report['batch_size']}, compile {report['compile']}; attention of the flow: {backends}",
            f"flow {in_words(report['solver'], report['steps'])}{latent}",
            "",
            markdown_table(["network", "parameters", "evaluations", "ms / image", "share"], rows),
            "",
            f"{ms['total']} ms per image, {report['images_per_second']} images/s "
            f"(spread {report['spread']:.0%}), peak memory {report['peak_memory_gb']} GB",
        ]
    )
