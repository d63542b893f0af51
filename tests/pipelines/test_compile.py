"""Compiled pipelines: one graph from noise to image, for every batch, and the images of the eager one."""

import pytest
import torch
from conftest import TINY, randomized
from typer.testing import CliRunner

from lediflow import FlowMatchingPipeline, LeDiFlowPipeline, UserError, VelocityTransformer
from lediflow.cli.app import app
from lediflow.networks.auxiliary import AuxiliaryModel
from lediflow.pipelines.base import ImagePipeline
from lediflow.training.builders import build_auxiliary, build_baseline, build_flow, build_sampler
from lediflow.training.config import load_config

SETTINGS = [*TINY, "flow.widths=[16]", "flow.depths=[1]"]  # compiling takes time for every block
CLASSES = [*SETTINGS, "data.classes=10"]


def lediflow_pipeline(settings=CLASSES):
    config = load_config("digits", settings)
    return LeDiFlowPipeline(
        auxiliary=randomized(build_auxiliary(config)),
        flow=randomized(build_flow(config, average_velocity=True)),
        sampler=randomized(build_sampler(config, average_velocity=True)),
    )


def flow_matching_pipeline():
    config = load_config("digits", CLASSES)
    return FlowMatchingPipeline(flow=randomized(build_baseline(config, average_velocity=True)))


def make(pipeline, num_images, **options):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(num_images, output_type="pt", **options)


class Recorder:
    """A backend of torch.compile that keeps the graphs and runs them as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph.graph)
        return graph


@pytest.mark.parametrize("build", [lediflow_pipeline, flow_matching_pipeline])
def test_from_noise_to_image_is_one_graph_for_all_batches(build):
    torch._dynamo.reset()
    pipeline = build()
    requests = [
        {"num_images": 5, "batch_size": 3, "guidance": 2.0},  # the last batch is smaller
        {"num_images": 4, "first_image": 2, "guidance": 2.0, "class_labels": [7, 2]},
        {"num_images": 2, "guidance": 2.0, "seed": 1},
    ]
    eager = [make(pipeline, **request) for request in requests]
    recorder = Recorder()
    pipeline.compile(backend=recorder, fullgraph=True)
    for request, expected in zip(requests, eager, strict=True):
        out = make(pipeline, **request)
        torch.testing.assert_close(out.images, expected.images, rtol=1e-4, atol=1e-4)
        assert out.nfe == expected.nfe
        assert len(recorder.graphs) == 1

    with torch.no_grad():
        for p in pipeline.flow.mapping.parameters():
            p.mul_(-2)
    fresh = build()
    fresh.flow.load_state_dict(pipeline.flow.state_dict())
    changed = make(pipeline, **requests[2])
    torch.testing.assert_close(changed.images, make(fresh, **requests[2]).images, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(changed.images, eager[2].images, atol=1e-3), "weights are no constants of it"
    assert len(recorder.graphs) == 1

    cosines = [node for node in recorder.graphs[0].nodes if node.target == "cos"]
    networks = 2 if hasattr(pipeline, "sampler") else 1
    assert len(cosines) == 2 * networks, "t and r - t of each network; rotary tables are constants"


@pytest.mark.slow
def test_with_other_solvers_each_network_is_compiled():
    torch._dynamo.reset()
    pipeline = lediflow_pipeline(SETTINGS)
    request = {"num_images": 3, "solver": "midpoint", "steps": 2, "latent_solver": "mean"}
    eager = make(pipeline, **request)
    recorder = Recorder()
    pipeline.compile(backend=recorder, fullgraph=True)  # a break within a network would be refused
    out = make(pipeline, **request)
    torch.testing.assert_close(out.images, eager.images, rtol=1e-4, atol=1e-4)
    assert out.nfe == eager.nfe == {"sampler": 1, "decoder": 1, "flow": 4}
    assert len(recorder.graphs) >= 3, "sampler, flow and the blocks of the decoder"


def test_mistakes_are_told_as_without_compiling():
    pipeline = lediflow_pipeline(SETTINGS)
    pipeline.compile(backend="eager")
    with pytest.raises(UserError, match="guidance 2 needs a model with classes"):
        make(pipeline, 1, guidance=2.0)


def test_several_neighbourhoods_fit_in_one_graph():
    """A tensor from a function with constant results used to make the second compilation fail."""
    torch._dynamo.reset()
    sizes = {"sample_size": 32, "in_channels": 1, "widths": (8,) * 3, "depths": (1,) * 3, "d_head": 8}
    decode = randomized(AuxiliaryModel(**sizes)).decode
    compiled = torch.compile(decode, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for z in (torch.ones(2, 4, 4, 4), torch.ones(1, 4, 4, 4)):
            torch.testing.assert_close(compiled(z).mean, decode(z).mean, rtol=1e-4, atol=1e-4)


def test_a_flow_without_z_and_without_classes_has_no_labels_to_draw():
    pipeline = FlowMatchingPipeline(
        flow=VelocityTransformer(8, 1, 2, (8,), (1,), d_head=8, mapping_width=8, average_velocity=True).eval()
    )
    assert not pipeline.labels_of(range(3), None)
    (x,) = pipeline._draw(range(3), seed=0)
    assert x.shape == (3, *pipeline.sample_shape) == (3, 1, 8, 8)


def test_the_command_line_compiles_when_asked(tiny_run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ImagePipeline, "compile", lambda self: asked.append(type(self)))
    for options, compiled in (([], []), (["--compile"], [LeDiFlowPipeline])):
        arguments = ["-n", "1", "--steps", "1", "--output", str(tmp_path), "--device", "cpu", *options]
        result = CliRunner().invoke(app, ["sample", str(tiny_run), *arguments])
        assert result.exit_code == 0, result.output
        assert asked == compiled


def test_the_benchmark_compiles_when_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(ImagePipeline, "compile", lambda self: asked.append(type(self)))
    settings = [x for s in TINY for x in ("--set", s)]
    arguments = ["--compile", "pipeline", "--batch-size", "1", "--repeats", "1"]
    result = CliRunner().invoke(app, ["benchmark", "digits", "--device", "cpu", *arguments, *settings])
    assert result.exit_code == 0, result.output
    assert set(asked) == {LeDiFlowPipeline}
