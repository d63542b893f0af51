"""A one-evaluation model as one graph, noise to image: torch.export's ``.pt2``, or ONNX.

DIR/model.onnx (or model.pt2)  the graph; any batch size, fp32
DIR/export.json                its inputs and outputs, what they were checked against, and times

`write_export` checks what it wrote against the pipeline, on other noise and another batch size than the graph
was traced with.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lediflow import ode
from lediflow.choices import ExportFormat
from lediflow.conditions import Conditions
from lediflow.errors import UserError
from lediflow.fields import conditional
from lediflow.files import shown, write_folder
from lediflow.pipelines.base import ImagePipeline
from lediflow.pipelines.lediflow import LeDiFlowPipeline

FILES: dict[str, str] = {"onnx": "model.onnx", "torch": "model.pt2"}
TOLERANCE = 1e-4  # largest difference to the pipeline, of images in [-1, 1]
_KNOWN = ("z", "label", "cluster", "guidance", "autoguidance")
_LEFT_OUT = ("augmentation", "text")  # which networks do without: pictures as they are, of any words


@dataclass(frozen=True)
class Input:
    """One input of the graph; each has a row for each image.

    Attributes:
        name: "w", "noise", "label", "cluster", or a strength of guidance as in the pipeline's call.
        shape: of a row.
        dtype: "float32" or "int64".
        low: least value; None for normal noise.
        high: largest value.
        default: what the pipeline takes where nothing is asked for; None for noise, classes and clusters.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    low: float | None = None
    high: float | None = None
    default: float | None = None


class OneEvaluation(nn.Module):
    """One evaluation of every network of a pipeline, as a function of tensors alone.

    Args:
        pipeline: whose networks have average velocities; fp32, on the CPU.

    Attributes:
        inputs: of `forward`, in order.

    Raises:
        UserError: a network without an average velocity, or one that is told what an export does not know.
    """

    def __init__(self, pipeline: ImagePipeline):
        super().__init__()
        self.pipeline = [pipeline]  # in a list: a module must not find its networks twice
        names = ("sampler", "flow") if isinstance(pipeline, LeDiFlowPipeline) else ("flow",)
        for name in names:
            network = getattr(pipeline, name)
            if not network.average_velocity:
                raise UserError(
                    f"the {name} has no average velocity, so this model has no single evaluation to export; "
                    "train the stages that refine it (`lediflow train ... --stage meanflow --stage "
                    "sampler-meanflow`), or name another model"
                )
            unknown = set(network.config.get("conditions") or {}) - {*_KNOWN, *_LEFT_OUT}
            if unknown:
                raise UserError(f"the {name} is told {', '.join(sorted(unknown))}, which cannot be exported")
        kept = (*names, "auxiliary", "vae")
        self.networks = nn.ModuleDict(
            {name: part for name in kept if isinstance(part := pipeline.components.get(name), nn.Module)}
        )
        self.inputs = _inputs(pipeline)

    def forward(self, *values: Tensor) -> Tensor:
        """Return images (B, C, H, W) in [-1, 1] for a tensor for each of `inputs`."""
        (pipeline,) = self.pipeline
        given = dict(zip((i.name for i in self.inputs), values, strict=True))
        labels = Conditions(label=given.get("label"), cluster=given.get("cluster"))
        x, latent = pipeline.temperature * given["noise"], Conditions()
        if isinstance(pipeline, LeDiFlowPipeline):
            told = labels.also(**_strengths(given, "latent_"))
            z = pipeline.auxiliary.unstandardize(_mean_step(pipeline.sampler, given["w"], told))
            x, latent = pipeline.prior(z).at(x), Conditions(z=z)
        made = _mean_step(pipeline.flow, x, labels.also(**latent, **_strengths(given, "")))
        images = pipeline._finish(made, {}, "pt").images
        assert isinstance(images, Tensor)
        return images


def _mean_step(network: Any, state: Tensor, told: Conditions) -> Tensor:
    """One step of the average velocity, from t = 0 to 1."""
    field = conditional(network, told.only(network.config.get("conditions") or ()))
    return ode.integrate(field, state, steps=1, solver="mean").end


def _strengths(given: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The strengths of one network, by the names of its conditions."""
    return {
        kind: given[f"{prefix}{kind}"] for kind in ("guidance", "autoguidance") if f"{prefix}{kind}" in given
    }


def _inputs(pipeline: ImagePipeline) -> list[Input]:
    found = [Input("noise", pipeline.sample_shape, "float32")]
    if isinstance(pipeline, LeDiFlowPipeline):
        found.insert(0, Input("w", tuple(pipeline.auxiliary.z_shape), "float32"))
    labels = {
        name: max(
            getattr(pipeline, part).classes(name)
            for part in ("flow", "sampler")
            if part in pipeline.components
        )
        for name in ("label", "cluster")
    }
    found += [Input(name, (), "int64", 0, count - 1) for name, count in labels.items() if count]
    best = pipeline.config.get("strengths") or {}
    for name, strength in pipeline.strengths().items():
        if strength.learned:
            found.append(Input(name, (), "float32", *strength.learned, best.get(name, 1.0)))
    return found


def describe_inputs(inputs: Sequence[Input]) -> list[dict[str, Any]]:
    """Return a graph's inputs as plain values for JSON."""
    return [asdict(i) | {"shape": list(i.shape)} for i in inputs]


def example(inputs: Sequence[Input], batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Return random values for a graph's inputs: normal noise, classes and strengths within their ranges."""
    generator = torch.Generator().manual_seed(seed)
    values = []
    for i in inputs:
        if i.low is None or i.high is None:
            values.append(torch.randn(batch, *i.shape, generator=generator))
        elif i.dtype == "int64":
            values.append(torch.randint(int(i.low), int(i.high) + 1, (batch,), generator=generator))
        else:
            values.append(i.low + (i.high - i.low) * torch.rand(batch, generator=generator))
    return tuple(values)


def write_export(
    pipeline: ImagePipeline, output: Path, format: ExportFormat = "onnx", *, seconds: float = 1.0
) -> dict[str, Any]:
    """Write a model's graph and its description to a folder.

    Args:
        pipeline: on the CPU, fp32.
        output: folder, replaced whole.
        format: "onnx", which needs the extra `export`, or "torch".
        seconds: that each time is measured for; 0 measures none.

    Returns:
        what export.json holds: "format", "file", "inputs", "output", "difference" (largest, to the pipeline's
        own images), and "milliseconds" for an image of a batch, by batch size, of torch and of the graph.

    Raises:
        UserError: no single evaluation, a missing package, a folder that holds something else,
            or the graph does not give the pipeline's images.
    """
    check_folder(output)
    if format == "onnx":
        check_onnx()
    if pipeline.config.codec_space and pipeline.vae is None:
        pipeline.load_codec()
    module = OneEvaluation(pipeline).eval()
    batches = {"difference": 3, "trace": 2}
    written: dict[str, Any] = {}

    def fill(folder: Path) -> None:
        path = folder / FILES[format]
        program = _trace(module, example(module.inputs, batches["trace"]))
        run = _save(program, module.inputs, path, format)
        given = example(module.inputs, batches["difference"], seed=1)
        with torch.no_grad():
            difference = (run(given) - module(*given)).abs().max().item()
        if not difference <= TOLERANCE:
            raise UserError(
                f"the exported graph differs from the model by {difference:.1e}, more than {TOLERANCE:g}; "
                "nothing was written"
            )
        written.update(_description(pipeline, module, format), difference=difference)
        if seconds:
            written["milliseconds"] = _times(module, run, seconds)
        (folder / "export.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")

    write_folder(output, fill)
    return written


def check_folder(output: Path) -> None:
    """Refuse to replace a folder that holds anything but an earlier export.

    Raises:
        UserError: it does, or it is no folder.
    """
    if output.is_dir():
        strange = {path.name for path in output.iterdir()} - {
            "export.json",
            "model.onnx.data",
            *FILES.values(),
        }
    else:
        strange = {output.name} if output.exists() else set()
    if strange:
        raise UserError(
            f"{shown(output)} holds {shown(min(strange))}, which is no export; choose another --output"
        )


def check_onnx() -> None:
    """Refuse an export to ONNX without its packages.

    Raises:
        UserError: naming the first that is missing.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError:
            raise UserError(
                f"an export to ONNX needs the package {name}; install `lediflow[export]`, or take "
                "--format torch"
            ) from None


def _trace(module: OneEvaluation, given: tuple[Tensor, ...]) -> Any:
    with torch.no_grad():
        # tables of positions and masks are made once and kept; made while tracing they would be no tensors
        module(*given)
        batch = torch.export.Dim("batch", min=1, max=2**16)
        rows = tuple({0: batch} for _ in given)
        return torch.export.export(module, given, dynamic_shapes=(rows,))


def _save(
    program: Any, inputs: Sequence[Input], path: Path, format: ExportFormat
) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """Write a graph, read it again, and return what runs the file."""
    if format == "torch":
        torch.export.save(program, path)
        loaded: Any = torch.export.load(path).module()

        def run_torch(given: tuple[Tensor, ...]) -> Tensor:
            with torch.no_grad():
                images: Tensor = loaded(*given)
                return images

        return run_torch
    import onnxruntime

    names = [i.name for i in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of versions of operators, which the check below tells better
        made = torch.onnx.export(
            program, dynamo=True, input_names=names, output_names=["images"], verbose=False
        )
    assert made is not None
    made.save(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run_onnx(given: tuple[Tensor, ...]) -> Tensor:
        feed = dict(zip(names, (value.numpy() for value in given), strict=True))
        return torch.from_numpy(session.run(["images"], feed)[0])

    return run_onnx


def _description(pipeline: ImagePipeline, module: OneEvaluation, format: ExportFormat) -> dict[str, Any]:
    from lediflow import __version__

    clusters = pipeline.components.get("clusters")
    channels, size = _image_shape(pipeline)
    return {
        "lediflow": __version__,
        "torch": torch.__version__,
        "format": format,
        "file": FILES[format],
        "inputs": describe_inputs(module.inputs),
        "output": {"name": "images", "shape": [channels, *size], "dtype": "float32", "low": -1, "high": 1},
        "classes": pipeline.class_names,
        # how often training images had each, by class: w alone does not say which cluster to ask for
        "images_of_clusters": None if clusters is None else clusters.images.int().tolist(),
    }


def _image_shape(pipeline: ImagePipeline) -> tuple[int, tuple[int, int]]:
    channels, h, w = pipeline.sample_shape
    if pipeline.space is None:
        return channels, (h, w)
    return 3, (h * pipeline.space.factor, w * pipeline.space.factor)


def _times(
    module: OneEvaluation, run: Callable[[tuple[Tensor, ...]], Tensor], seconds: float
) -> dict[str, dict[str, float]]:
    """Milliseconds for an image, by batch size: the least of repeated calls, after one that is not timed."""

    def least(call: Callable[[], Any], batch: int) -> float:
        call()
        found: list[float] = []
        end = time.perf_counter() + seconds
        while not found or time.perf_counter() < end:
            began = time.perf_counter()
            call()
            found.append(time.perf_counter() - began)
        return round(1000 * min(found) / batch, 3)

    times: dict[str, dict[str, float]] = {"pipeline": {}, "export": {}}
    with torch.no_grad():
        for batch in (1, 16):
            given = example(module.inputs, batch)
            times["pipeline"][str(batch)] = least(lambda given=given: module(*given), batch)  # type: ignore[misc]
            times["export"][str(batch)] = least(lambda given=given: run(given), batch)  # type: ignore[misc]
    return times
