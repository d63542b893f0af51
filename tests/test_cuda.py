"""What only a GPU can tell: every stage trains there and computes what the CPU computes. Skipped without."""

import json
import shutil

import pytest
import torch
from conftest import FIRST_STAGES, REFINING, TINY, UPSAMPLING, weights

from lediflow.networks import attention
from lediflow.pipelines.load import load_pipeline, load_upsampler
from lediflow.sources import BLOCK, BatchNoise
from lediflow.training.config import load_config
from lediflow.training.run import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CUDA = torch.device("cuda")
ALL = (*FIRST_STAGES, *REFINING, *UPSAMPLING)


def losses(run, stage):
    lines = (run / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All stages, six steps each in bf16."""
    config = load_config("digits", [*TINY, "upsampler.crop=8", "training.precision=bf16"])
    return train(config, tmp_path_factory.mktemp("cuda") / "run", stages=ALL, device="cuda")


@pytest.mark.parametrize("stage", ALL)
def test_every_stage_trains_in_bf16(run, stage):
    assert len(losses(run, stage)) == 3
    assert all(torch.isfinite(torch.tensor(losses(run, stage))))


@pytest.mark.parametrize("compile", ["blocks", "model"])
def test_compiled_training_has_the_losses_of_eager_training(tmp_path, compile):
    stages = ["auxiliary", "flow", "meanflow"]
    runs = {}
    for how in ("none", compile):
        config = load_config("digits", [*TINY, f"training.compile={how}"])
        runs[how] = train(config, tmp_path / how, stages=stages, device="cuda")
    for stage in stages:
        assert losses(runs[compile], stage) == pytest.approx(losses(runs["none"], stage), rel=2e-2)


def test_a_stopped_run_resumes_as_if_it_had_not_stopped(run, tmp_path):
    half, whole = tmp_path / "half", tmp_path / "whole"
    for stop, folder in (("steps=3", half), ("steps=6", half), ("steps=6", whole)):
        config = load_config("digits", [*TINY, f"training.baseline.{stop}"])
        train(config, folder, stages=["baseline"], device="cuda")
    a, b = weights(half, "baseline"), weights(whole, "baseline")
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["", "flow", "baseline"])
def test_images_are_those_of_the_cpu(run, part):
    pipeline = load_pipeline(str(run / part))
    pipeline.set_progress_bar_config(disable=True)
    here = pipeline(num_images=5, seed=3, output_type="pt").images
    there = pipeline.to(CUDA)(num_images=5, seed=3, output_type="pt").images
    torch.testing.assert_close(there.cpu(), here, atol=2e-3, rtol=0)


@pytest.mark.parametrize("part", ["upsampler", "upsampler-learned"])
def test_enlarged_images_are_those_of_the_cpu(run, part):
    pipeline = load_upsampler(run / part)
    pipeline.set_progress_bar_config(disable=True)
    low = torch.rand(2, 1, 8, 8)
    here = pipeline(low, seed=0, output_type="pt").images
    there = pipeline.to(CUDA)(low, seed=0, output_type="pt").images
    # torch lets a GPU round what it convolves to 10 bits (TF32), and the prior convolves
    torch.testing.assert_close(there.cpu(), here, atol=1e-2, rtol=0)


@pytest.mark.parametrize("backend", ["tiles", "flex", "natten"])
@pytest.mark.parametrize("kernel", [7, 3])
def test_backends_compute_the_same_with_the_same_gradients(backend, kernel):
    if missing := attention.missing_package(backend):
        pytest.skip(f"needs {missing}")
    grid = (32, 40)

    def attended(which):
        torch.manual_seed(0)
        q, k, v, out = torch.randn(4, 2, 3, 32 * 40, 16, device=CUDA).unbind(0)
        inputs = [u.detach().requires_grad_() for u in (q, k, v)]
        result = attention.self_attention(*inputs, grid, kernel, which)
        (result * out).sum().backward()
        return [result, *(u.grad for u in inputs)]

    for a, b in zip(attended(backend), attended("dense"), strict=True):
        assert (a - b).norm() / b.norm() < 2e-3


def test_parts_of_a_batch_meet_the_noise_of_the_whole():
    def noise(start, stop):
        found = BatchNoise(3, batch_size=100, positions=range(start, stop), device=CUDA)
        return found.normal((2, 5, 5), "x")

    whole = noise(0, 100)
    parts = [noise(0, 3), noise(3, BLOCK), noise(BLOCK, BLOCK + 1), noise(BLOCK + 1, 100)]
    assert torch.equal(whole, torch.cat(parts))
    assert abs(torch.corrcoef(whole.flatten(1))[0, 1:]).max() < 0.7, "each image has its own"
    assert float(whole.std()) == pytest.approx(1, abs=0.05)


def test_a_run_of_the_gpu_continues_on_the_cpu(run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    config = load_config(
        "digits", [*TINY, "upsampler.crop=8", "training.precision=bf16", "training.baseline.steps=8"]
    )
    train(config, moved, stages=["baseline"], device="cpu")
    assert len(losses(moved, "baseline")) == 4
