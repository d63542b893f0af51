"""A one-evaluation model as one graph: the same images as the pipeline's own, through the file."""

import json

import pytest
import torch
from conftest import random_network, refused

from lediflow.errors import UserError
from lediflow.pipelines.export import TOLERANCE, OneEvaluation, check_folder, example, write_export
from lediflow.pipelines.flow_matching import FlowMatchingPipeline
from lediflow.pipelines.lediflow import LeDiFlowPipeline
from lediflow.pipelines.load import load_pipeline
from lediflow.training.config import load_config


@pytest.fixture(scope="module")
def pipeline():
    """With clusters, classes and learned guidance, all of random weights."""
    from conftest import TINY

    settings = [s for s in TINY if not s.startswith(("clusters", "training.sampler_meanflow.guidance"))]
    config = load_config(
        "digits",
        [*settings, "clusters.count=3", "data.classes=10", "training.sampler_meanflow.guidance=[1,2]"],
    )
    clusters = random_network(config, "clusters")
    clusters.images.fill_(5)
    parts = {"auxiliary": "auxiliary", "flow": "meanflow", "sampler": "sampler-meanflow"}
    networks = {part: random_network(config, stage) for part, stage in parts.items()}
    pipe = LeDiFlowPipeline(**networks, clusters=clusters, strengths={"latent_guidance": 1.5})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_module_gives_the_images_of_the_pipeline(pipeline):
    module = OneEvaluation(pipeline)
    assert [i.name for i in module.inputs] == ["w", "noise", "label", "cluster", "latent_guidance"]
    assert module.inputs[-1].low == 1 and module.inputs[-1].high == 2 and module.inputs[-1].default == 1.5
    indices = range(3)
    labels = pipeline.labels_of(indices, [4, 2], cluster=[1, 2, 0])
    given = (*pipeline._draw(indices, 7), labels["label"], labels["cluster"], torch.full((3,), 1.5))
    wanted = pipeline(3, class_labels=[4, 2], cluster=[1, 2, 0], seed=7, output_type="pt").images
    assert torch.equal(module(*given), wanted)
    stronger = module(*given[:-1], torch.full((3,), 2.0))
    assert not torch.allclose(stronger, wanted, atol=1e-3), "the strength is an input, not a constant"


def test_examples_lie_within_their_ranges(pipeline):
    inputs = OneEvaluation(pipeline).inputs
    for i, value in zip(inputs, example(inputs, 50), strict=True):
        assert value.shape == (50, *i.shape) and str(value.dtype) == f"torch.{i.dtype}"
        assert i.low is None or (value.min() >= i.low and value.max() <= i.high)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_the_file_gives_the_images_of_the_pipeline(pipeline, tmp_path, format):
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"{package} is of the extra export")
    report = write_export(pipeline, tmp_path / "out", format, seconds=0)
    assert report["difference"] <= TOLERANCE
    assert report == json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["images_of_clusters"] == [[5, 5, 5]] * 10
    given = example(OneEvaluation(pipeline).inputs, 5, seed=4)  # no batch that was traced or checked
    if format == "torch":
        made = torch.export.load(tmp_path / "out" / report["file"]).module()(*given)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / "out" / report["file"])
        feed = {i["name"]: value.numpy() for i, value in zip(report["inputs"], given, strict=True)}
        made = torch.from_numpy(session.run(["images"], feed)[0])
    with torch.no_grad():
        wanted = OneEvaluation(pipeline)(*given)
    assert made.shape == (5, *report["output"]["shape"])
    assert (made - wanted).abs().max() <= TOLERANCE


def test_words_and_augmentations_are_left_out():
    from conftest import TINY

    settings = [
        *TINY,
        "data.classes=10",
        "data.augment.share=0.5",
        "text.encoder=characters",
        "text.column=label",
    ]
    config = load_config("digits", settings)
    parts = {"auxiliary": "auxiliary", "flow": "meanflow", "sampler": "sampler-meanflow"}
    pipe = LeDiFlowPipeline(**{part: random_network(config, stage) for part, stage in parts.items()})
    pipe.set_progress_bar_config(disable=True)
    assert {"augmentation", "text"} <= {*pipe.sampler.config.conditions, *pipe.flow.config.conditions}
    module = OneEvaluation(pipe)
    assert [i.name for i in module.inputs] == ["w", "noise", "label"]
    wanted = pipe(2, class_labels=[4, 2], seed=7, output_type="pt").images
    assert torch.equal(module(*pipe._draw(range(2), 7), torch.tensor([4, 2])), wanted)


def test_plain_flow_matching_has_noise_alone(tiny_mean_run):
    baseline = load_pipeline(tiny_mean_run / "baseline-meanflow")
    assert isinstance(baseline, FlowMatchingPipeline)
    module = OneEvaluation(baseline)
    assert [i.name for i in module.inputs] == ["noise"]
    wanted = baseline(2, seed=3, output_type="pt").images
    assert torch.equal(module(*baseline._draw(range(2), 3)), wanted)


def test_what_cannot_be_exported_is_refused(tiny_run, tmp_path, lediflow):
    with pytest.raises(UserError, match="the sampler has no average velocity"):
        write_export(load_pipeline(tiny_run), tmp_path / "out", "torch")
    assert not (tmp_path / "out").exists()
    assert refused(lediflow("export", tiny_run, "--output", tmp_path / "x", "--format", "onxx"), "'onnx'")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"thesis\.tex, which is no export"):
        check_folder(tmp_path / "mine")
