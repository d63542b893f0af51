"""`lediflow benchmark`: how fast a model or preset is on this machine."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from lediflow.cli.options import Device, Set


def benchmark(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|PRESET", help="Run folder, saved pipeline, Hub id, or a preset.")
    ],
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 8,
    dtype: Annotated[
        str, typer.Option(help="fp32, bf16, fp16, or auto: bf16 where the device multiplies it, else fp32.")
    ] = "auto",
    repeats: Annotated[int, typer.Option(help="Timed repetitions; the median counts.")] = 3,
    attention: Annotated[
        str | None, typer.Option(help="Force a backend: dense, tiles, flex or natten.", show_default=False)
    ] = None,
    compile: Annotated[str, typer.Option(help="none, blocks, model or pipeline.")] = "none",
    average_velocity: Annotated[
        bool,
        typer.Option(
            "--average-velocity",
            help="Time a preset as refined to one evaluation; needless where its training.stages do it.",
        ),
    ] = False,
    training: Annotated[bool, typer.Option(help="Also time a training step of the flow.")] = True,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="In that training step.")
    ] = False,
    codec: Annotated[
        str | None,
        typer.Option(
            help="Also time this autoencoder (folder or Hub id) on the latents.", show_default=False
        ),
    ] = None,
    settings: Set = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Time sampling as in the paper's Table 1, each network, and a training step; count operations.

    A preset is timed with untrained weights, which take the same time. Plain flow matching with the same
    network is timed beside it. A model with an average velocity has a row of one step too, which stands
    against 8 midpoint steps of plain flow matching. Stop other work first.

    Examples:

        lediflow benchmark runs/flowers

        lediflow benchmark ffhq-256-sdv --batch-size 8 --json

        lediflow benchmark flowers-64 --average-velocity

        lediflow benchmark ffhq-256 --attention dense --set data.image_size=128
    """
    import os

    from lediflow.codecs import Codec
    from lediflow.errors import UserError, nearest
    from lediflow.evaluation.benchmark import benchmark as run_benchmark
    from lediflow.evaluation.benchmark import pipeline_of
    from lediflow.networks.attention import VARIABLE, check_backend
    from lediflow.precision import settle_precision
    from lediflow.training.processes import check_device

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
        print(f"timing {model} on {where}: {repeats + 1} turns of everything", file=sys.stderr)
    report = {
        "model": model,
        **run_benchmark(
            pipeline_of(model, settings, average_velocity=average_velocity),
            device=where,
            codec=Codec.load(codec) if codec else None,
            dtype=dtype,
            batch_size=batch_size,
            repeats=repeats,
            compile=compile,  # type: ignore[arg-type]  # checked above
            training=training,
            gradient_checkpointing=gradient_checkpointing,
        ),
    }
    print(json.dumps(report, indent=1) if as_json else _text(report))


def _text(report: dict[str, Any]) -> str:
    from lediflow.evaluation.report import markdown_table
    from lediflow.evaluation.sampling import in_words, latent_words

    against = {"mean": "one mean step against 8 midpoint steps"}
    backends = ", ".join(f"{grid} {name}" for grid, name in report["attention"].items())
    networks = markdown_table(
        ["network", "parameters", "GFLOP / image", "ms / image", "share of matmul rate"],
        [
            [name, f"{n['parameters']:,}", n["gflop"], n["ms_per_image"], f"{n['share_of_matmul']:.0%}"]
            for name, n in report["networks"].items()
        ],
    )
    sampling = markdown_table(
        [
            "model",
            "latent sampler",
            "flow",
            "ms / image",
            "images / s",
            "sampler ms",
            "decoder ms",
            "flow ms",
        ],
        [
            [
                row["model"],
                latent_words(row),
                in_words(row["solver"], row["steps"]),
                row["ms_per_image"],
                row["images_per_second"],
                *(row["ms"].get(name, "") for name in ("sampler", "decoder", "flow")),
            ]
            for row in report["sampling"]
        ],
    )
    lines = [
        f"{report['device']}, {report['threads']} threads, {report['dtype']}, batch {report['batch_size']}, "
        f"compile {report['compile']}; large matmul {report['matmul_gflops']:,} GFLOP/s",
        f"attention of the flow: {backends}",
        "",
        "One evaluation of each network:",
        networks,
        "",
        "Sampling (the split is evaluations x time of one):",
        sampling,
        "",
        *(
            f"LeDiFlow takes 1/{factor} of the time ({against.get(solver, solver)})"
            for solver, factor in report["speedup"].items()
        ),
    ]
    if "training" in report:
        t = report["training"]
        lines.append(
            f"training step of the flow: {t['ms_per_step']} ms, {t['images_per_second']} images/s, "
            f"{t['share_of_matmul']:.0%} of the matmul rate, peak memory {t['peak_memory_gb']} GB"
        )
    return "\n".join(lines)
