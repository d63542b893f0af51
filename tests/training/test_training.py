"""Training: resuming, reproducing, checkpoints, run folders, and that the learned prior is nearer."""

import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from conftest import FIRST_STAGES, TINY, shared, weights
from PIL import Image

from lediflow.devices import check_device
from lediflow.errors import UserError
from lediflow.training import checkpoint, inputs, run_pipelines, texts
from lediflow.training.config import load_config
from lediflow.training.run import train
from lediflow.training.trainer import Interrupted, rate_factor


def assert_same_weights(a, b, stages=FIRST_STAGES):
    for stage in stages:
        left, right = weights(a, stage), weights(b, stage)
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), (stage, name)


def test_a_run_folder_is_complete(tiny_run):
    for stage in FIRST_STAGES:
        assert (tiny_run / stage / "checkpoints" / "step-6" / "optimizer.safetensors").is_file()
        lines = [json.loads(x) for x in (tiny_run / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [2, 4, 6]
        assert all(line["loss"] == line["loss"] for line in lines)
        assert (tiny_run / stage / "previews" / "step-000006.png").is_file()
    assert list((tiny_run / "logs").rglob("events.out.tfevents.*"))
    assert load_config(tiny_run / "config.yaml") == load_config("digits", TINY)
    assert "| flow | " in (tiny_run / "README.md").read_text()
    assert not list(tiny_run.rglob(".*")), "something was left half-written"


def test_resumed_equals_uninterrupted(tiny_run, tmp_path):
    """Every stage stopped halfway and continued, against the run that never stopped: bit for bit."""
    half = [f"training.{stage}.steps=3" for stage in FIRST_STAGES]
    run = train(
        load_config("digits", TINY + half), tmp_path / "run", device="cpu", stages=["auxiliary", "baseline"]
    )
    assert checkpoint.steps_on_disk(run / "baseline" / "checkpoints") == [3]
    train(load_config("digits", TINY), run, device="cpu", stages=["auxiliary", "baseline"])
    train(load_config("digits", TINY + half), run, device="cpu", stages=["flow", "sampler"])
    train(load_config("digits", TINY), run, device="cpu")
    assert_same_weights(tiny_run, run)
    steps = [json.loads(x)["step"] for x in (run / "flow" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 3, 4, 6]


def test_another_seed_gives_other_weights(tiny_run, tmp_path):
    other = load_config("digits", [*TINY, "training.seed=1"])
    run = train(other, tmp_path / "run", device="cpu", stages=["baseline"])
    assert not torch.equal(
        weights(run, "baseline")["patch_in.weight"], weights(tiny_run, "baseline")["patch_in.weight"]
    )


def test_the_sampler_may_learn_z_as_it_is(tiny_run, tmp_path):
    raw = load_config("digits", [*TINY, "training.auxiliary.standardize_z=false"])
    run = train(raw, tmp_path / "run", device="cpu", stages=["auxiliary", "sampler"])
    ours, theirs = weights(run, "auxiliary"), weights(tiny_run, "auxiliary")
    assert torch.equal(ours["z_mean"], torch.zeros(1, 4, 1, 1))
    assert torch.equal(ours["z_std"], torch.ones(1, 4, 1, 1))
    assert not torch.equal(theirs["z_std"], torch.ones(1, 4, 1, 1))


def test_stop_signal_saves_and_the_run_resumes(tmp_path):
    long = load_config("digits", [*TINY, "training.baseline.steps=100000"])
    log, deadline = tmp_path / "run" / "baseline" / "metrics.jsonl", time.monotonic() + 120

    def stop_once_it_trains():
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    watching = threading.Thread(target=stop_once_it_trains)
    watching.start()
    with pytest.raises(Interrupted, match="everything is saved"):
        train(long, tmp_path / "run", device="cpu", stages=["baseline"])
    watching.join()
    reached = checkpoint.steps_on_disk(tmp_path / "run" / "baseline" / "checkpoints")[-1]
    assert 0 < reached < 100000
    finish = load_config("digits", [*TINY, f"training.baseline.steps={reached + 2}"])
    train(finish, tmp_path / "run", device="cpu", stages=["baseline"])
    assert checkpoint.steps_on_disk(tmp_path / "run" / "baseline" / "checkpoints")[-1] == reached + 2


def test_a_signal_at_the_end_of_a_stage_is_not_lost(tiny_run, tmp_path, monkeypatch):
    """It comes while the last preview is drawn: the next stage does not begin."""
    from lediflow.training.objectives import Elbo

    preview = Elbo.preview

    def signalled(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return preview(self)

    monkeypatch.setattr(Elbo, "preview", signalled)
    with pytest.raises(Interrupted, match="stopped at step 6 of stage auxiliary"):
        train(load_config("digits", TINY), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "flow").exists()
    monkeypatch.undo()
    train(load_config("digits", TINY), tmp_path / "run", device="cpu", stages=["auxiliary", "flow"])
    assert_same_weights(tiny_run, tmp_path / "run", ["auxiliary", "flow"])


def test_a_run_of_another_config_is_refused_with_the_difference(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    with pytest.raises(UserError, match=r"flow.widths: \[16, 16\] there, \[24, 24\] now"):
        train(load_config("digits", [*TINY, "flow.widths=[24,24]"]), run, device="cpu")


def test_a_start_that_failed_claims_no_folder(tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        train(load_config("digits", [*TINY, "data.train=nowhere"]), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_no_resume_moves_the_earlier_stage_aside(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    train(load_config("digits", TINY), run, device="cpu", stages=["baseline"], resume=False)
    assert (run / "baseline.old-1" / "checkpoints" / "step-6").is_dir()
    assert_same_weights(tiny_run, run, ["baseline"])


def test_a_flow_trained_on_another_auxiliary_model_is_refused(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    longer = load_config("digits", [*TINY, "training.auxiliary.steps=8"])
    train(longer, run, device="cpu", stages=["auxiliary"])
    with pytest.raises(UserError, match="trained with another auxiliary.*--no-resume"):
        train(longer, run, device="cpu", stages=["flow"])


def test_stages_that_need_the_auxiliary_model_say_so(tmp_path):
    with pytest.raises(UserError, match="no trained auxiliary stage yet"):
        train(load_config("digits", TINY), tmp_path / "run", device="cpu", stages=["flow"])


@pytest.mark.parametrize(
    "name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"]
)
def test_a_checkpoint_cut_short_is_named_with_the_way_out(name, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    path = run / "baseline" / "checkpoints" / "step-6" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    longer = load_config("digits", [*TINY, "training.baseline.steps=8"])
    with pytest.raises(UserError, match="step-6 is damaged or cut short.*delete that folder"):
        train(longer, run, device="cpu", stages=["baseline"])


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"[]", b""])
def test_a_damaged_record_of_the_run_is_named(content, tmp_path):
    readers = {
        "strengths.json": lambda: run_pipelines.kept_strengths(tmp_path, ".", {}),
        "dataset.json": lambda: inputs.open_data(load_config("digits", TINY), tmp_path),
        "codec_space.json": lambda: inputs.codec_space(tmp_path),
        texts.RECORD: lambda: texts.kept_encoder(tmp_path),
    }
    for name, read in readers.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"cannot read .*{name}.*; .*(delete it|another folder)"):
            read()
        (tmp_path / name).unlink()
        read()
    (tmp_path / "dataset.json").write_text('{"train": "digits"}')
    with pytest.raises(UserError, match=r"dataset.json names no commit; delete it"):
        readers["dataset.json"]()
    (tmp_path / "step-6").mkdir()
    (tmp_path / "step-6" / "state.json").write_bytes(content)
    with pytest.raises(UserError, match="step-6 is damaged"):
        checkpoint.load_state(tmp_path / "step-6")


def test_damaged_lines_of_metrics_do_not_stop_a_run(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    path = run / "baseline" / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b'\xff\xfe\n{"loss": 1}\n[3]\n' + whole + b'{"step": 6, "lo')
    longer = load_config("digits", [*TINY, "training.baseline.steps=8"])
    train(longer, run, device="cpu", stages=["baseline"])
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 8 and path.read_bytes().startswith(whole)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    config = load_config("digits", [*TINY, "training.checkpoint_every=1", "training.keep_checkpoints=2"])
    run = train(config, tmp_path / "run", device="cpu", stages=["baseline"])
    assert checkpoint.steps_on_disk(run / "baseline" / "checkpoints") == [5, 6]


def test_every_kth_checkpoint_is_kept_too(tmp_path):
    every = ["training.checkpoint_every=1", "training.keep_checkpoints=1", "training.keep_every=2"]
    run = train(load_config("digits", [*TINY, *every]), tmp_path / "run", device="cpu", stages=["baseline"])
    assert checkpoint.steps_on_disk(run / "baseline" / "checkpoints") == [2, 4, 6]


def test_accumulated_parts_make_the_steps_of_the_whole_batch(tiny_run, tmp_path):
    config = load_config("digits", [*TINY, "training.accumulate=4"])
    run = train(config, tmp_path / "run", device="cpu", stages=["auxiliary", "baseline"])
    for stage in ("auxiliary", "baseline"):
        left, right = weights(tiny_run, stage), weights(run, stage)
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="auxiliary.batch_size 8 is not divisible by 3 .*nearest that is: 9"):
        train(load_config("digits", [*TINY, "training.accumulate=3"]), tmp_path / "other", device="cpu")


def test_a_stream_goes_on_from_its_position(tmp_path, monkeypatch):
    """Resumed equals uninterrupted, and what was read before is not read again."""
    import datasets

    from lediflow.data.streams import StreamData

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "pictures").mkdir()
    for n in range(24):
        Image.new("L", (16, 16), 10 * n).save(tmp_path / "pictures" / f"{n:02d}.png")
    settings = [*TINY, f"data.train={str(tmp_path / 'pictures')!r}", "data.streaming=true"]
    settings += ["data.shuffle_block=8", "training.checkpoint_every=3"]
    run = train(load_config("digits", settings), tmp_path / "whole", device="cpu", stages=["baseline"])
    half = load_config("digits", [*settings, "training.baseline.steps=3"])
    train(half, tmp_path / "run", device="cpu", stages=["baseline"])
    positions = checkpoint.load_state(tmp_path / "run" / "baseline" / "checkpoints" / "step-3")["positions"]
    assert len(positions) == 1 and positions[0]["ranks"] == 1
    given, serve = [], StreamData.serve
    monkeypatch.setattr(
        StreamData, "serve", lambda self, **options: given.append(options) or serve(self, **options)
    )
    train(load_config("digits", settings), tmp_path / "run", device="cpu", stages=["baseline"])
    assert [(options["start"], options["position"]) for options in given] == [(3, positions[0])]
    assert_same_weights(run, tmp_path / "run", ["baseline"])


def test_a_disk_that_fills_up_ends_the_run_with_the_last_checkpoint_intact(tmp_path, monkeypatch):
    """The third checkpoint meets a full disk; with space again the run goes on to the same weights."""
    config = load_config("digits", [*TINY, "training.checkpoint_every=1", "training.tracker=none"])
    undisturbed = train(config, tmp_path / "undisturbed", device="cpu", stages=["baseline"])
    assert not (undisturbed / "logs").exists()
    write = checkpoint.save_file

    def full(tensors, path):
        if path.parent.name == ".step-3.new" and path.name == "optimizer.safetensors":
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="cannot write .*step-3.*No space left on device"):
        train(config, tmp_path / "run", device="cpu", stages=["baseline"])
    assert os.listdir(tmp_path / "run" / "baseline" / "checkpoints") in (
        ["step-1", "step-2"],
        ["step-2", "step-1"],
    )
    monkeypatch.setattr(checkpoint, "save_file", write)
    train(config, tmp_path / "run", device="cpu", stages=["baseline"])
    assert_same_weights(undisturbed, tmp_path / "run", ["baseline"])


def test_averages_are_kept_resumed_and_made_into_pipelines(tmp_path):
    averages = "training.ema=[{name: short, max_decay: 0.1}, {name: long, half_life: 1000}]"
    half = [f"training.{stage}.steps=3" for stage in FIRST_STAGES]
    whole = train(load_config("digits", [*TINY, averages]), tmp_path / "whole", device="cpu")
    run = train(load_config("digits", [*TINY, averages, *half]), tmp_path / "run", device="cpu",
                stages=["auxiliary", "baseline"])  # fmt: skip
    train(load_config("digits", [*TINY, averages]), run, device="cpu", stages=["auxiliary", "baseline"])
    last = "baseline/checkpoints/step-6"
    for file in ("ema.safetensors", "ema-long.safetensors"):
        assert (whole / last / file).read_bytes() == (run / last / file).read_bytes()
    from lediflow import FlowMatchingPipeline, LeDiFlowPipeline

    long = checkpoint.load_tensors(whole / last, "ema-long.safetensors")
    pipeline = FlowMatchingPipeline.from_pretrained(whole / "averages" / "long" / "baseline" / "pipeline")
    assert torch.equal(pipeline.flow.patch_in.weight, long["patch_in.weight"])
    assert not torch.equal(weights(whole, "baseline")["patch_in.weight"], long["patch_in.weight"])
    LeDiFlowPipeline.from_pretrained(whole / "averages" / "long" / "pipeline")
    with pytest.raises(UserError, match="every average needs a name of its own"):
        load_config("digits", ["training.ema=[{name: a}, {name: a}]"])


def test_trackers_that_are_not_installed_are_named(tmp_path, monkeypatch):
    from lediflow.training import trackers

    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for name in ("wandb", "trackio"):
        with pytest.raises(UserError, match=f"needs the package {name}: pip install {name}"):
            train(load_config("digits", [*TINY, f"training.tracker={name}"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fp16_is_refused_where_it_cannot_work(tmp_path):
    with pytest.raises(UserError, match="fp16 needs a CUDA GPU, not cpu"):
        train(load_config("digits", ["training.precision=fp16"]), tmp_path / "run", device="cpu")


def test_classes_must_match_the_data(tmp_path):
    with pytest.raises(UserError, match="data.classes is 7, but digits has 10 classes: 0, 1.*classes=10"):
        train(load_config("digits", [*TINY, "data.classes=7"]), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)

    def save():
        checkpoint.save(tmp_path, 1, files={"model": model.state_dict()}, state={}, keep=1)

    save()
    before = (tmp_path / "step-1" / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.weight.zero_()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left on device.*free some space"):
        save()
    assert (tmp_path / "step-1" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_loss_that_is_not_finite_stops_with_a_diagnosis(tmp_path):
    config = load_config(
        "digits", [*TINY, "training.baseline.learning_rate=1e30", "training.baseline.steps=50"]
    )
    with pytest.raises(
        UserError,
        match="bad steps in a row.*not finite.*There is no checkpoint to return to.*baseline.learning_rate",
    ):
        train(config, tmp_path / "run", device="cpu", stages=["baseline"])


def test_learning_rate_warms_up_and_decays():
    settings = load_config("digits").training.flow.model_copy(update={"warmup_steps": 10, "steps": 110})
    assert rate_factor(5, settings) == pytest.approx(0.5)
    assert rate_factor(10, settings) == pytest.approx(1.0)
    assert rate_factor(60, settings) == pytest.approx(0.5)
    assert rate_factor(110, settings) == pytest.approx(0.0)
    assert rate_factor(60, settings.model_copy(update={"schedule": "constant"})) == 1.0
    linear = settings.model_copy(update={"schedule": "linear"})
    assert [rate_factor(n, linear) for n in (5, 10, 35, 110)] == pytest.approx([0.5, 1.0, 0.75, 0.0])
    root = settings.model_copy(update={"schedule": "inverse-sqrt"})
    assert [rate_factor(n, root) for n in (5, 10, 40, 90)] == pytest.approx([0.5, 1.0, 0.5, 1 / 3])


def test_devices_are_checked_by_name():
    assert check_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="unknown device 'gpu'"):
        check_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no cuda device"):
            check_device("cuda:0")


def test_unknown_stage_is_refused(tmp_path):
    with pytest.raises(UserError, match="unknown stage 'flows'.*did you mean 'flow'"):
        train(load_config("digits", TINY), tmp_path / "run", stages=["flows"])


@pytest.mark.slow
def test_the_learned_prior_is_nearer_than_the_gaussian(tmp_path):
    """Transport cost E (y - x)^2 per element on held-out digits, after a short training."""
    from lediflow.data.images import ImageData
    from lediflow.pictures import to_float
    from lediflow.training.run_pipelines import load_network

    stage = ("steps=150", "batch_size=32", "learning_rate=3e-3")
    overrides = [*TINY, "auxiliary.widths=[32,64]", *(f"training.auxiliary.{setting}" for setting in stage)]
    config = load_config("digits", overrides)
    run = train(config, tmp_path / "run", device="cpu", stages=["auxiliary"])
    auxiliary = load_network(run, "auxiliary", config)
    y = to_float(ImageData("digits", image_size=16, channels=1, split="validation").images)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        z = auxiliary.encode(y).sample(g)
        learned = (y - auxiliary.decode(z).sample(g)).square().mean()
    gaussian = (y - torch.randn(y.shape, generator=g)).square().mean()
    assert learned < 0.4 * gaussian
    standardized = auxiliary.standardize(auxiliary.encode(y).sample(g))
    assert standardized.mean().abs() < 0.2
    assert standardized.std().item() == pytest.approx(1, abs=0.2)


def test_lazy_data_trains_as_cached_data_does(tmp_path):
    """Images that do not fit in memory are encoded on the fly; without flips nothing else changes."""
    runs = [
        train(load_config("digits", [*TINY, f"data.cache_gb={gb}"]), tmp_path / str(gb), device="cpu",
              stages=["auxiliary", "flow"])
        for gb in (1.0, 0.0)
    ]  # fmt: skip
    for stage in ("auxiliary", "flow"):
        left, right = weights(runs[0], stage), weights(runs[1], stage)
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-4)


def test_real_faces_train_for_a_few_steps_with_flips(tmp_path):
    path = shared("data/faces64-validation.parquet")
    small = ["auxiliary.widths=[32,32,32]", "auxiliary.decoder_widths=null", "flow.widths=[32]"]
    small += ["clusters.count=0"]
    small += ["sampler.widths=[32]", "flow.depths=[1]", "sampler.depths=[1]"]
    steps = [override for override in TINY if override.startswith("training") and "precision" not in override]
    config = load_config("faces-32", [*small, *steps, f"data.train={path}"])
    run = train(config, tmp_path / "run", device="cpu")
    from lediflow import LeDiFlowPipeline

    images = LeDiFlowPipeline.from_pretrained(run / "pipeline")(2, steps=1, latent_steps=1).images
    assert images[0].size == (32, 32)
    assert images[0].mode == "RGB"
