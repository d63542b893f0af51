"""The commands as a user types them: results, messages, exit codes."""

import json
import logging
import shutil
import subprocess
import sys
import time

import pytest
from conftest import TINY, tiny_codec_settings
from PIL import Image


@pytest.fixture
def lediflow(monkeypatch, capsys):
    """Run a command in this process; what a shell would start differs only in time."""
    from lediflow.cli.app import main

    # diffusers' logger writes to the stderr that it first met, which may be an earlier test's
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lediflow", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, end.value.code or 0, out, err)

    return run


def refused(result, *parts):
    """A user's mistake: exit code 2, a short message, no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr
    return True


def sets(*overrides):
    return [part for override in overrides for part in ("--set", override)]


def test_help_is_quick_because_imports_are_lazy():
    heavy = "('torch', 'diffusers', 'datasets', 'matplotlib')"
    code = f"import sys, lediflow.cli.app; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    began = time.perf_counter()
    result = subprocess.run([sys.executable, "-m", "lediflow", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert time.perf_counter() - began < 10  # a net for gross mistakes; benchmarks/ measures
    for command in ("train", "sample", "demo", "presets", "encode", "data"):
        assert command in result.stdout


@pytest.mark.parametrize(
    "command",
    [
        "train", "sample", "demo", "presets", "encode", "data inspect", "evaluate", "diagnose", "benchmark",
    ],
)  # fmt: skip
def test_every_command_teaches_with_an_example(lediflow, command):
    result = lediflow(*command.split(), "--help")
    assert result.returncode == 0
    assert f"lediflow {command}" in result.stdout
    assert "Example" in result.stdout


def test_presets_list_show_and_json(lediflow):
    assert "faces-32" in lediflow("presets").stdout
    assert "importance_weighting: true" in lediflow("presets", "digits").stdout
    report = json.loads(lediflow("presets", "--json").stdout)
    assert set(report["ffhq-256"]["parameters"]) == {"auxiliary", "flow", "sampler", "baseline"}
    assert set(report["digits"]["parameters"]) > {"flow", "meanflow", "sampler-meanflow"}
    refused(lediflow("presets", "digit"), "did you mean 'digits'")


def test_train_a_folder_with_a_broken_file_then_sample(lediflow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        Image.new("RGB", (20 + i, 16), (20 * i, 100, 255 - 20 * i)).save(pictures / f"{i}.png")
    (pictures / "broken.png").write_bytes(b"not a picture")
    settings = [*TINY, "data.image_size=16", "data.channels=3"]
    files = ("--data", "pictures", "--output", "run")
    result = lediflow("train", "digits", *files, "--device", "cpu", *sets(*settings))
    assert result.returncode == 0, result.stderr
    assert "12 images of 16 px" in result.stderr
    assert "broken.png" in result.stderr, "what was skipped is named"
    assert "next: lediflow sample run" in result.stdout

    result = lediflow("sample", "run", "-n", 3, "--steps", 1, "--output", "out", "--json", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["nfe"] == {"sampler": 8, "decoder": 1, "flow": 2}
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["000000.png", "000001.png", "000002.png", "grid.png"]
    assert Image.open(tmp_path / "out" / "000000.png").size == (16, 16)


def test_sample_goes_on_with_an_earlier_request(lediflow, tiny_run, tmp_path):
    assert lediflow("sample", tiny_run, "-n", 3, "--output", tmp_path / "a").returncode == 0
    assert (
        lediflow("sample", tiny_run, "-n", 1, "--first-image", 2, "--output", tmp_path / "b").returncode == 0
    )
    left, right = (Image.open(tmp_path / f / "000002.png").tobytes() for f in ("a", "b"))
    assert max(abs(x - y) for x, y in zip(left, right, strict=True)) <= 1


def test_bad_requests_to_sample(lediflow, tiny_run, tmp_path):
    refused(lediflow("sample", tiny_run, "--steps", 0), "steps must be at least 1")
    refused(lediflow("sample", tiny_run, "--solver", "midpont"), "did you mean 'midpoint'")
    refused(lediflow("sample", tiny_run, "--device", "gpu0"), "unknown device 'gpu0'")
    refused(lediflow("sample", tiny_run, "--dtype", "int8"), "unknown dtype")
    refused(lediflow("sample", tmp_path / "nowhere"), "no model")
    refused(lediflow("sample", tiny_run / "baseline", "--latent-steps", 2), "has no latent sampler")
    copy = shutil.copytree(tiny_run / "pipeline", tmp_path / "copy")
    for weights in copy.rglob("*.safetensors"):
        weights.unlink()
    refused(lediflow("sample", copy), "cannot load")


def test_sample_tells_solver_and_steps_and_takes_one_evaluation_where_it_can(
    lediflow, tiny_mean_run, tmp_path
):
    few = ("-n", 2, "--device", "cpu", "--output", tmp_path)

    def report(model, *options):
        result = lediflow("sample", model, *few, *options, "--json")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    by_default = report(tiny_mean_run)
    assert by_default["nfe"] == {"sampler": 1, "decoder": 1, "flow": 1}
    assert (by_default["solver"], by_default["steps"]) == ("mean", 1)
    assert (by_default["latent_solver"], by_default["latent_steps"]) == ("mean", 1)
    any_solver = ("--solver", "midpoint", "--latent-solver", "heun3", "--latent-steps", 2)
    assert report(tiny_mean_run, *any_solver)["nfe"] == {"sampler": 6, "decoder": 1, "flow": 4}
    assert report(tiny_mean_run / "distill")["nfe"] == {"sampler": 1, "decoder": 1, "flow": 1}
    assert report(tiny_mean_run / "flow")["nfe"] == {"sampler": 8, "decoder": 1, "flow": 4}
    plain = report(tiny_mean_run / "baseline-meanflow")
    assert plain["nfe"] == {"flow": 1}
    assert "latent_solver" not in plain
    assert report(tiny_mean_run / "baseline")["nfe"] == {"flow": 16}

    said = lediflow("sample", tiny_mean_run, *few).stdout
    assert "flow 1 mean step, latent sampler 1 mean step" in said
    assert "flow 8 midpoint steps\n" in lediflow("sample", tiny_mean_run / "baseline", *few).stdout
    refused(lediflow("sample", tiny_mean_run / "flow", "--solver", "mean"), "--stage meanflow")
    latent = ("--latent-solver", "mean")
    refused(lediflow("sample", tiny_mean_run / "flow", *latent), "--stage sampler-meanflow")
    refused(lediflow("sample", tiny_mean_run / "baseline-meanflow", *latent), "leave --latent-solver out")


def test_bad_requests_to_train(lediflow, tiny_run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("hello")
    train = ("train", "digits", "--output", tmp_path / "run", "--data")
    refused(lediflow(*train, tmp_path / "nowhere"), "nowhere")
    refused(lediflow(*train, tmp_path / "empty"), "empty")
    refused(lediflow(*train, tmp_path / "texts"), "notes.txt")
    refused(lediflow("train", "faces-32", "--output", tmp_path / "run"), "no dataset: give --data")
    refused(lediflow("train", "face-32"), "did you mean 'faces-32'")
    refused(
        lediflow("train", "digits", "--stage", "samplr", "--output", tmp_path / "x"), "did you mean 'sampler'"
    )
    refused(lediflow("train", "digits", *sets("flow.widht=[8]")), "did you mean 'flow.widths'")
    refused(lediflow("train", "digits", "--output", tiny_run), "holds a run of another config", "flow.widths")


def test_inspect_a_folder(lediflow, tmp_path):
    for name in ("cat/0.png", "cat/1.png", "dog/0.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), "red").save(tmp_path / "set" / name)
    (tmp_path / "set" / "dog" / "bad.png").write_bytes(b"no picture")
    result = lediflow("data", "inspect", tmp_path / "set", "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    for part in ("3 readable of 4", "20x16 3", "cat 2, dog 1", "bad.png: not a picture", "contact-sheet.png"):
        assert part in result.stdout
    assert Image.open(tmp_path / "out" / "contact-sheet.png").width > 200
    report = json.loads(lediflow("data", "inspect", tmp_path / "set", "--json").stdout)
    assert report["classes"] == {"cat": 2, "dog": 1} and report["images"] == 4
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    refused(lediflow("data", "inspect", tmp_path / "nowhere"), "no file or folder")


def test_encode_with_two_processes_then_train_and_sample(lediflow, tiny_codec, tiny_latents, tmp_path):
    options = ["--codec", tiny_codec, "--image-size", 16, "--split", "validation", "--shard-size", 100]
    options += ["--batch-size", 50, "--device", "cpu"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "-m", "lediflow", "encode"]
    command = [sys.executable, *launch, "digits", *options, "--output", tmp_path / "latents"]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "297 images as latents of 4x8x8" in result.stdout
    assert f"next: lediflow train PRESET --data {tmp_path / 'latents'}" in result.stdout
    for path in tiny_latents.iterdir():
        assert (tmp_path / "latents" / path.name).read_bytes() == path.read_bytes(), path.name

    settings = tiny_codec_settings(tiny_codec, tiny_latents)
    files = ("--data", tmp_path / "latents", "--output", tmp_path / "run")
    result = lediflow("train", "digits", *files, "--device", "cpu", *sets(*settings))
    assert result.returncode == 0, result.stderr
    assert "297 latents of 4x8x8 (16 px)" in result.stderr
    result = lediflow("sample", tmp_path / "run", "-n", 2, "--output", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["nfe"] == {"sampler": 8, "decoder": 1, "flow": 4, "codec": 1}
    assert Image.open(tmp_path / "out" / "000001.png").size == (16, 16)
    refused(lediflow("sample", tmp_path / "run", "--codec", tmp_path), "cannot load the codec")
    refused(
        lediflow("encode", "digits", *options, "--output", tmp_path / "latents", "--dtype", "bf16"),
        "fp16 there",
    )
    refused(lediflow("encode", "digits", "--codec", tmp_path / "no", "--output", tmp_path / "x"), "no codec")


def test_demo_end_to_end_with_few_steps(lediflow, tmp_path):
    from lediflow.evaluation.compare import compare_run
    from lediflow.training.config import load_config
    from lediflow.training.run import train

    mean = "training.stages=[auxiliary, flow, sampler, baseline, meanflow, sampler-meanflow]"
    steps = sets(*TINY, mean)
    result = lediflow("demo", "--output", tmp_path / "demo", "--device", "cpu", *steps)
    assert result.returncode == 0, result.stderr
    out = result.stdout
    for part in (
        "| LeDiFlow ",
        "| LeDiFlow, one evaluation ",
        "| flow matching ",
        "1 + 1 + 1",
        "2 + 4 + 1",
        "16 + 0 + 0",
        "floor",
        "next: lediflow sample",
    ):
        assert part in out
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert len(results["rows"]) == 12
    assert all(row["frechet"] > results["floor"] for row in results["rows"]), "six steps of training are bad"
    assert results["classifier_accuracy"] > 0.9
    for name in ("grid.png", "quality.png"):
        assert Image.open(tmp_path / "demo" / name).width > 300

    # the demo again on a finished run trains nothing and measures the same quality
    run = train(load_config("digits", TINY), tmp_path / "demo", device="cpu")
    again = compare_run(run, device="cpu", steps=(1,), groups=3)
    assert again.rows[0].frechet == pytest.approx(results["rows"][0]["frechet"], rel=0.02)


def test_evaluate_prints_a_table_and_writes_a_report(lediflow, tiny_run, tmp_path):
    request = ("evaluate", tiny_run, tiny_run / "baseline", "--data", "digits", "--features", "classifier")
    few = ("--steps", "1", "-n", 30, "--reference-images", 60, "--bootstrap", 4, "--classifier-steps", 5)
    files = (
        "--output",
        tmp_path / "out",
        "--cache",
        tmp_path / "cache",
        "--device",
        "cpu",
        "--batch-size",
        15,
    )
    result = lediflow(*request, *few, *files)
    assert result.returncode == 0, result.stderr
    assert "| tiny/baseline | midpoint |" in result.stdout
    assert f"report: {tmp_path / 'out' / 'report.html'}" in result.stdout
    assert "note: 30 samples do not determine a covariance" in result.stderr
    again = lediflow(*request, *few, *files, "--json")
    assert "measured before" in again.stderr
    assert [row["steps"] for row in json.loads(again.stdout)["rows"]] == [1, 1]
    refused(lediflow(*request, "--solver", "mean"), "nothing is left to measure", "tiny/baseline: no row")
    refused(lediflow(*request, "--steps", "1,two"), "give whole numbers")
    refused(lediflow(*request, "--solver", "heun33"), "did you mean 'heun3'")
    refused(lediflow("evaluate", tiny_run, "--data", tmp_path / "nowhere"), "nowhere")


def test_diagnose_prints_verdicts(lediflow, tiny_run):
    request = ("diagnose", tiny_run, "--data", "digits", "-n", 50, "--latent-steps", 1, "--device", "cpu")
    result = lediflow(*request)
    assert result.returncode == 0, result.stderr
    for part in ("transport cost", "calibration", "endpoint error", "gap between", "The learned prior"):
        assert part in result.stdout
    report = json.loads(lediflow(*request, "--json").stdout)
    assert report["findings"][0]["grade"] in ("good", "fair", "poor")
    refused(lediflow("diagnose", tiny_run / "baseline", "--data", "digits"), "no learned prior")
    refused(lediflow(*request, "--latent-solver", "mean"), "--stage sampler-meanflow")
