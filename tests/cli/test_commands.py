"""The commands as a user types them: results, messages, exit codes."""

import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from conftest import TINY, refused, tiny_codec_settings
from PIL import Image


def sets(*overrides):
    return [part for override in overrides for part in ("--set", override)]


def test_help_is_quick_because_imports_are_lazy():
    heavy = "('torch', 'diffusers', 'datasets', 'matplotlib')"
    code = f"import sys, lediflow.cli.app; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    result = subprocess.run([sys.executable, "-m", "lediflow", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    for command in ("train", "sample", "demo", "presets", "encode", "data"):
        assert command in result.stdout


@pytest.mark.parametrize(
    "command",
    [
        "train", "sample", "demo", "presets", "encode", "data inspect", "evaluate", "diagnose", "benchmark",
        "env", "config", "reconstruct", "interpolate", "vary", "inpaint", "restyle", "upsample", "clusters",
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
    assert names == ["000000.png", "000001.png", "000002.png", "grid.png", "request.json"]
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
    few = ("-n", 2, "--device", "cpu", "--overwrite", "--output", tmp_path)

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


def test_demo_end_to_end_with_few_steps(lediflow, tmp_path, monkeypatch):
    from lediflow.evaluation import demo as module
    from lediflow.evaluation.demo import compare_run

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    when_first: list[list[str]] = []

    def first_grid(run, device):
        when_first.append(sorted(path.parent.parent.name for path in run.glob("*/checkpoints/step-6")))
        return grid(run, device)

    grid = module.first_grid
    monkeypatch.setattr(module, "first_grid", first_grid)
    stages = ("auxiliary", "clusters", "flow", "sampler", "baseline", "meanflow", "sampler-meanflow")
    guided = ("clusters.count=3", "training.sampler_meanflow.guidance=[1,2]")
    settings = sets(*TINY, *guided, f"training.stages=[{', '.join(stages)}]")
    result = lediflow("demo", "--output", tmp_path / "demo", "--device", "cpu", *settings)
    assert result.returncode == 0, result.stderr
    assert when_first == [["auxiliary", "flow", "sampler"]], "a picture as soon as there is a model"
    assert f"first picture: {tmp_path / 'demo' / 'grid.png'}" in result.stderr
    assert ".: latent_guidance" in result.stderr and "is best" in result.stderr
    for part in (
        "| LeDiFlow ",
        "| LeDiFlow, one evaluation ",
        "| flow matching ",
        "1 + 1 + 1",
        "2 + 4 + 1",
        "8 + 0 + 0",
        "floor",
        "next: lediflow sample",
    ):
        assert part in result.stdout
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert [(row["model"], row["steps"]) for row in results["rows"]] == [
        ("LeDiFlow", 1),
        ("LeDiFlow, one evaluation", 1),
        *(("flow matching", steps) for steps in (1, 2, 4)),
    ]
    assert all(row["frechet"] > results["floor"] for row in results["rows"]), "six steps of training are bad"
    assert results["classifier_accuracy"] > 0.9
    assert results["images_per_row"] == 297, "as many as there are held-out digits"
    for name in ("grid.png", "quality.png"):
        assert Image.open(tmp_path / "demo" / name).width > 300
    assert (tmp_path / "demo" / "table.md").read_text().startswith("| model ")
    assert "<table>" in (tmp_path / "demo" / "evaluation" / "report.html").read_text()

    # what was measured is kept
    again = compare_run(tmp_path / "demo", device="cpu")
    assert again.rows == results["rows"]


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
    refused(lediflow("evaluate", tiny_run, "--data", tmp_path / "nowhere", "-o", tmp_path / "no"), "nowhere")


def test_diagnose_prints_verdicts_and_how_far_it_is(lediflow, tiny_run, monkeypatch):
    monkeypatch.setattr("lediflow.progress.SECONDS_BETWEEN_LINES", 0.0)
    request = ("diagnose", tiny_run, "--data", "digits", "-n", 50, "--latent-steps", 1, "--device", "cpu")
    result = lediflow(*request)
    assert result.returncode == 0, result.stderr
    for part in (
        "diagnose 0/5  images to z and back",
        "3/5  paths of the flow",
        "4/5  paths of the base",
        "5/5",
    ):
        assert part in result.stderr
    for part in ("transport cost", "calibration", "endpoint error", "gap between", "The learned prior"):
        assert part in result.stdout
    report = json.loads(lediflow(*request, "--json").stdout)
    assert report["findings"][0]["grade"] in ("good", "fair", "poor")
    refused(lediflow("diagnose", tiny_run / "baseline", "--data", "digits"), "no learned prior")
    refused(lediflow(*request, "--latent-solver", "mean"), "--stage sampler-meanflow")


def test_a_request_that_was_cut_off_resumes_and_another_is_not_mixed_in(lediflow, tiny_run, tmp_path):
    few = ("sample", tiny_run, "-n", 5, "--batch-size", 2, "--device", "cpu", "--output", tmp_path)
    assert json.loads(lediflow(*few, "--json").stdout)["found"] == 0
    images = [tmp_path / f"{i:06d}.png" for i in range(5)]
    before = [path.read_bytes() for path in images]
    images[3].unlink()
    (tmp_path / f".000003-{'0' * 32}.png").write_bytes(b"half")
    report = json.loads(lediflow(*few, "--json").stdout)
    assert report["found"] == 3, "the batch of image 3 is made again"
    assert [path.read_bytes() for path in images] == before
    assert not list(tmp_path.glob(".*"))
    refused(lediflow(*few, "--seed", 1), r"(seed: 0 there, 1 now); give --overwrite to replace what is there")
    assert [path.read_bytes() for path in images] == before
    assert (
        lediflow("sample", tiny_run, "-n", 2, "--seed", 1, "--overwrite", "--output", tmp_path).returncode
        == 0
    )
    assert sorted(p.name for p in tmp_path.glob("0*.png")) == ["000000.png", "000001.png"]


def test_what_cannot_be_sampled_claims_no_folder(lediflow, tiny_run, tmp_path):
    for wrong, message in (
        (("-n", 0), "num_images must be at least 1"),
        (("--class", "cat"), "trained without classes"),
        (("--guidance", 2), "guidance 2 needs a model with classes"),
        (("--steps", 0), "steps must be at least 1"),
    ):
        refused(lediflow("sample", tiny_run, *wrong, "--output", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


def test_env_tells_what_a_bug_report_needs(lediflow):
    report = json.loads(lediflow("env", "--json").stdout)
    assert report["packages"]["torch"] == metadata.version("torch")
    assert report["defaults"]["precision=auto"] in ("bf16", "fp32")
    assert report["attention backends"]["dense"] == "available"
    assert "natten" in lediflow("env").stdout


def test_config_explains_every_setting(lediflow):
    settings = {setting["key"]: setting for setting in json.loads(lediflow("config", "--json").stdout)}
    assert all(setting["meaning"] for setting in settings.values())
    assert settings["training.flow.steps"]["default"] == 1000
    assert settings["training.sampler_meanflow.coupling"]["type"] == "independent or optimal-transport"
    assert "eq. 6" in lediflow("config", "training.flow.importance_weighting").stdout
    refused(lediflow("config", "training.flo"), "did you mean 'training.flow'")


def test_a_dry_run_times_every_stage_and_writes_nothing(lediflow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages = ("--stage", "auxiliary,flow,sampler", "--stage", "meanflow", "--stage", "distill")
    result = lediflow("train", "digits", "--dry-run", "--json", "--device", "cpu", *stages, *sets(*TINY))
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert [e["stage"] for e in report["stages"]] == ["auxiliary", "flow", "sampler", "meanflow", "distill"]
    assert all(e["ms_per_step"] > 0 and e["steps"] == 6 for e in report["stages"])
    assert report["batch"]["shape"] == [8, 1, 16, 16]
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_what_is_not_trained_step_by_step(lediflow):
    result = lediflow("train", "digits", "--dry-run", "--stage", "clusters", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "1500 images" in result.stdout
    assert "nothing of this is trained step by step" in result.stdout


def test_the_installed_script_answers():
    """The command that `pip install` puts on the path, not the function behind it."""
    script = Path(sys.executable).with_name("lediflow")
    result = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("lediflow "), result.stderr
