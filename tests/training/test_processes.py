"""Two processes on one machine make the steps and the images of one."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import TINY, weights
from PIL import Image

from lediflow.pipelines.save import batches_of_process
from lediflow.training import checkpoint
from lediflow.training.config import load_config
from lediflow.training.run import train

STAGES = ("auxiliary", "flow")
TWENTY = [*TINY, "training.log_every=1", "data.classes=10", *(f"training.{s}.steps=20" for s in STAGES)]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def command(*arguments, settings=()):
    sets = [part for setting in settings for part in ("--set", setting)]
    return [*TORCHRUN, "-m", "lediflow", *map(str, arguments), "--device", "cpu", *sets]


def started(arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def run_two(*arguments, settings=()):
    process = started(command(*arguments, settings=settings))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    config = load_config("digits", TWENTY)
    return train(config, tmp_path_factory.mktemp("runs") / "alone", device="cpu", stages=STAGES)


def curve(run, stage, name):
    lines = (run / stage / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)[name] for line in lines])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_draw_the_curve_of_one(parallel, alone, tmp_path):
    run, settings = tmp_path / "run", [*TWENTY, f"training.parallel={parallel}"]
    stages = [part for stage in STAGES for part in ("--stage", stage)]
    output = run_two("train", "digits", "--output", run, *stages, settings=settings)
    assert f"2 processes ({parallel})" in output
    assert output.count("run folder: ") == 1, "one process speaks"
    for stage in STAGES:
        for name in ("loss", "grad_norm"):
            expected = curve(alone, stage, name)
            assert len(expected) == 20
            torch.testing.assert_close(curve(run, stage, name), expected, rtol=1e-5, atol=0)
        for file in ("model", "ema", "optimizer"):
            left, right = (
                checkpoint.load_tensors(r / stage / "checkpoints" / "step-20", f"{file}.safetensors")
                for r in (alone, run)
            )
            assert left.keys() == right.keys()
            for key in left:
                torch.testing.assert_close(right[key], left[key], rtol=1e-3, atol=1e-4)

    # one process goes on where the two stopped
    longer = load_config("digits", [*settings, "training.flow.steps=22"])
    train(longer, run, device="cpu", stages=["flow"])
    assert len(curve(run, "flow", "loss")) == 22
    assert not list(run.rglob(".*"))


def test_a_signal_to_one_process_saves_and_stops_all(tmp_path):
    run, settings = tmp_path / "run", [*TINY, "training.baseline.steps=100000"]
    process = started(command("train", "digits", "--output", run, "--stage", "baseline", settings=settings))
    log = run / "baseline" / "metrics.jsonl"
    deadline = time.monotonic() + 300  # a busy machine takes long to start two processes
    while not (log.exists() and log.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert log.exists() and log.read_text(), "no step was made"
    second = next(p for p in psutil.Process(process.pid).children() if p.environ()["RANK"] == "1")
    second.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert output.count("everything is saved") == 1, output
    reached = checkpoint.steps_on_disk(run / "baseline" / "checkpoints")
    assert len(reached) == 1
    assert weights(run, "baseline")


def test_sampling_split_over_processes_gives_the_same_files(tiny_run, tmp_path):
    from lediflow import load_pipeline
    from lediflow.pictures import to_pil

    arguments = ("sample", tiny_run, "-n", 7, "--batch-size", 2, "--seed", 5, "--output", tmp_path, "--json")
    report = json.loads(run_two(*arguments).splitlines()[-1])
    assert report["nfe"] == {"sampler": 8, "decoder": 1, "flow": 4}
    pipeline = load_pipeline(tiny_run)
    expected = to_pil(pipeline(7, seed=5, batch_size=2, output_type="pt").images)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"{i:06d}.png" for i in range(7)),
        "grid.png",
        "request.json",
    ]
    for i, image in enumerate(expected):
        left, right = image.tobytes(), Image.open(tmp_path / f"{i:06d}.png").tobytes()
        assert max(abs(a - b) for a, b in zip(left, right, strict=True)) <= 1


@pytest.mark.parametrize("count", [1, 7, 64, 65])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_batches_of_the_processes_make_up_the_request(count, processes):
    parts = [batches_of_process(count, 8, p, processes) for p in range(processes)]
    made = sorted(i for batches in parts for part in batches for i in part)
    assert made == list(range(count))
    if processes > 1 and count >= 8 * processes:
        assert {part.start % 8 for batches in parts for part in batches} == {0}, "the batches of one process"
    assert max(len(batches) for batches in parts) - min(len(batches) for batches in parts) <= 1
