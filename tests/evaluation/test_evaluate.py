"""A whole evaluation on a run of six steps, and what it keeps."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lediflow.errors import UserError
from lediflow.evaluation import evaluate as module
from lediflow.evaluation.evaluate import evaluate
from lediflow.evaluation.evaluation_report import quality_table, speed_table, verdicts
from lediflow.evaluation.feature_networks import ClassifierFeatures
from lediflow.evaluation.features import SmallClassifier
from lediflow.evaluation.measure import Request, copies, distances, in_pixels, reconstruct, timings
from lediflow.evaluation.reference import RealFeatures
from lediflow.evaluation.settings import Settings
from lediflow.pipelines.base import load_pipeline
from lediflow.pipelines.lediflow import LeDiFlowPipeline
from lediflow.sources import image_noise
from lediflow.training.builders import build_auxiliary, build_flow, build_sampler
from lediflow.training.config import load_config
from tests.conftest import TINY

SMALL = {
    "data": "digits",
    "steps": (1, 2),
    "features": ("classifier",),
    "num_images": 70,
    "reference_images": 200,
    "batch_size": 16,
    "bootstrap": 8,
    "classifier_steps": 10,
}


@pytest.fixture(scope="module")
def measured(tiny_run, tmp_path_factory):
    """An evaluation of both models of the tiny run, its folder and its cache."""
    folder = tmp_path_factory.mktemp("evaluation")
    models = [str(tiny_run), str(tiny_run / "baseline")]
    results = evaluate(models, Settings(**SMALL), folder / "out", cache=folder / "cache", device="cpu")
    return SimpleNamespace(results=results, models=models, out=folder / "out", cache=folder / "cache")


def test_one_record_for_each_model_solver_and_steps(measured):
    results = json.loads((measured.out / "results.json").read_text())
    assert results == json.loads(json.dumps(measured.results))
    assert [(r["model"], r["solver"], r["steps"]) for r in results["rows"]] == [
        ("tiny", "midpoint", 1),
        ("tiny", "midpoint", 2),
        ("tiny/baseline", "midpoint", 1),
        ("tiny/baseline", "midpoint", 2),
    ]
    first, last = results["rows"][0], results["rows"][-1]
    assert first["nfe"] == {"sampler": 8, "decoder": 1, "flow": 2}
    assert (first["latent_solver"], first["latent_steps"]) == ("midpoint", 4)
    assert last["nfe"] == {"flow": 4}
    assert (last["latent_solver"], last["latent_steps"]) == (None, None)
    common = {
        f"classifier/{name}"
        for name in ("mmd", "kernel", "frechet", "precision", "density", "recall", "coverage", "copies")
    }
    assert set(last["metrics"]) == common
    assert set(first["metrics"]) == common | {"reconstruction/psnr", "reconstruction/ssim"}
    for row in results["rows"]:
        for estimate in row["metrics"].values():
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
        ms = row["ms_per_image"]
        assert sum(v for k, v in ms.items() if k != "total") == pytest.approx(ms["total"])
        assert set(ms) == {"total", "other", *row["nfe"]}
        assert row["images_per_second"] == pytest.approx(1000 / ms["total"])


def test_untrained_models_are_far_from_the_floor(measured):
    floor = measured.results["real"][0]["floor"]["classifier/frechet"]
    for row in measured.results["rows"]:
        assert row["metrics"]["classifier/frechet"]["low"] > floor["high"]
        assert row["metrics"]["classifier/mmd"]["low"] > 0


def test_report_holds_its_pictures_and_every_number(measured):
    page = (measured.out / "report.html").read_text()
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) >= 6, "plots, a grid for each model, closest images for each model"
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page
    table = (measured.out / "table.md").read_text()
    for row in measured.results["rows"]:
        assert f"{row['ms_per_image']['total']:.2f}" in table
        assert f"{row['metrics']['classifier/frechet']['value']:.3g}" in page
    assert "70 real images, 16 px" in table
    assert "8 sampler + 1 decoder + 2 flow" in table


def test_each_model_is_measured_with_the_solvers_it_has(tiny_mean_run, measured, tmp_path, capsys):
    models = [str(tiny_mean_run / name) for name in (".", "baseline-meanflow", "baseline")]
    few = SMALL | {"steps": (1,), "num_images": 30, "bootstrap": 0}
    at = {"cache": measured.cache, "device": "cpu"}
    by_default = evaluate(models, Settings(**few), tmp_path, **at)
    assert capsys.readouterr().err.count("no row with solver mean") == 0, "nobody asked for it"
    facts = [
        (r["model"], r["solver"], r["latent_solver"], r["latent_steps"], r["nfe"]) for r in by_default["rows"]
    ]
    assert facts == [
        ("mean", "mean", "mean", 1, {"sampler": 1, "decoder": 1, "flow": 1}),
        ("mean", "midpoint", "mean", 1, {"sampler": 1, "decoder": 1, "flow": 2}),
        ("mean/baseline-meanflow", "mean", None, None, {"flow": 1}),
        ("mean/baseline-meanflow", "midpoint", None, None, {"flow": 2}),
        ("mean/baseline", "midpoint", None, None, {"flow": 2}),
    ]
    assert "| mean | mean | 1 | 1 mean step | 1 sampler + 1 decoder + 1 flow |" in re.sub(
        " +", " ", (tmp_path / "table.md").read_text()
    )

    asked = Settings(**few, solvers=("mean",), latent_solver="midpoint", latent_steps=2)
    results = evaluate(models, asked, tmp_path, **at)
    said = capsys.readouterr().err
    assert said.count("no row with solver mean") == 1
    assert "mean/baseline: no row with solver mean, because the model has no average velocity" in said
    assert [(r["model"], r["nfe"]) for r in results["rows"]] == [
        ("mean", {"sampler": 4, "decoder": 1, "flow": 1}),
        ("mean/baseline-meanflow", {"flow": 1}),
    ]
    assert results["rows"][1] == by_default["rows"][2] | {
        key: results["rows"][1][key] for key in ("ms_per_image", "images_per_second", "timing_spread")
    }, "what does not depend on the latent sampler is not measured again"
    with pytest.raises(UserError, match="nothing is left to measure"):
        evaluate(models[2:], asked, tmp_path, **at)
    with pytest.raises(UserError, match="tiny: latent solver 'mean' needs"):
        evaluate(measured.models[:1], Settings(**few, latent_solver="mean"), tmp_path, **at)


def test_a_model_with_classes_makes_all_of_them_in_turn():
    config = load_config("digits", [*TINY, "data.classes=3", "training.stages=[meanflow,sampler-meanflow]"])
    pipeline = LeDiFlowPipeline(
        auxiliary=build_auxiliary(config),
        flow=build_flow(config, average_velocity=True),
        sampler=build_sampler(config, average_velocity=True),
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    for p in pipeline.flow.parameters():
        if p.ndim > 1:  # many are zero before training, and then no class tells
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    request = Request("mean", 1, 5, 0, 4, "fp32", "mean", 1)
    images = request.images(pipeline, range(2, 7)).images
    for i, image in zip(range(2, 7), images, strict=True):
        right, wrong = (
            pipeline(1, first_image=i, class_labels=(i + off) % 3, output_type="pt").images[0]
            for off in (0, 1)
        )
        torch.testing.assert_close(image, right, atol=1e-4, rtol=0)
        assert (image - wrong).abs().max() > 1e-3


def test_what_was_measured_is_not_measured_again(measured, monkeypatch):
    calls = []
    features, times = module.generated_features, module.timings
    monkeypatch.setattr(module, "generated_features", lambda *a: calls.append(a[1].steps) or features(*a))
    monkeypatch.setattr(module, "timings", lambda rows: calls.append("times") or times(rows))
    again = evaluate(measured.models, Settings(**SMALL), measured.out, cache=measured.cache, device="cpu")
    assert calls == []
    assert again == measured.results
    more = Settings(**SMALL | {"steps": (1, 2, 4)})
    evaluate(measured.models[:1], more, measured.out, cache=measured.cache, device="cpu")
    assert calls == [4, "times"]


def test_a_killed_evaluation_goes_on_with_the_rows_it_has(measured, monkeypatch, tmp_path):
    out = shutil.copytree(measured.out, tmp_path / "out")
    rows = [p for p in (out / "rows").glob("*.json") if not p.name.startswith("times")]
    lost = measured.results["rows"][0]["metrics"]  # the folder may hold rows of other evaluations too
    next(p for p in rows if json.loads(p.read_text())["metrics"] == lost).write_text("{half")
    for path in out.glob("rows/times-*"):
        path.unlink()
    calls = []
    features = module.generated_features
    monkeypatch.setattr(module, "generated_features", lambda *a: calls.append(1) or features(*a))
    again = evaluate(measured.models, Settings(**SMALL), out, cache=measured.cache, device="cpu")
    assert len(calls) == 1
    assert [r["metrics"] for r in again["rows"]] == [r["metrics"] for r in measured.results["rows"]]


def test_two_processes_measure_what_one_does(measured, tmp_path):
    arguments = [
        "evaluate",
        *measured.models,
        "--data",
        "digits",
        "--features",
        "classifier",
        "--steps",
        "1,2",
    ]
    arguments += ["-n", "70", "--reference-images", "200", "--batch-size", "16", "--bootstrap", "8"]
    arguments += ["--classifier-steps", "10", "--device", "cpu", "--output", str(tmp_path / "out")]
    arguments += ["--cache", str(measured.cache), "--json"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*launch, "-m", "lediflow", *arguments], capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    both = json.loads(result.stdout)
    for ours, theirs in zip(measured.results["rows"], both["rows"], strict=True):
        for name, estimate in ours["metrics"].items():
            assert theirs["metrics"][name]["value"] == pytest.approx(estimate["value"], rel=1e-4, abs=1e-6)


def test_notes_say_where_counts_mislead(tiny_run, measured, tmp_path):
    settings = Settings(**SMALL | {"steps": (1,), "num_images": 320, "bootstrap": 0})
    results = evaluate([str(tiny_run)], settings, tmp_path, cache=measured.cache, device="cpu")
    notes = " ".join(results["notes"])
    assert "only 200 real images stand against 320" in notes
    assert "the floor is measured with 200" in notes
    estimate = results["rows"][0]["metrics"]["classifier/frechet"]
    assert estimate["low"] == estimate["high"]
    few = Settings(**SMALL | {"steps": (1,), "num_images": 40})
    results = evaluate([str(tiny_run)], few, tmp_path, cache=measured.cache, device="cpu")
    assert any("40 samples do not determine a covariance" in note for note in results["notes"])


def test_default_features_fall_back_to_the_classifier_and_say_so(tiny_run, measured, monkeypatch, tmp_path):
    def unreachable(name, revision):
        raise UserError(f"{name} is not cached here")

    monkeypatch.setattr("lediflow.evaluation.feature_networks._check_reachable", unreachable)
    settings = Settings(**SMALL | {"steps": (1,), "features": ()})
    results = evaluate([str(tiny_run)], settings, tmp_path, cache=measured.cache, device="cpu")
    assert results["features"][0]["headline"] == "classifier/frechet"
    assert any("small classifier" in note and "not cached here" in note for note in results["notes"])


def test_mistakes(tiny_run, measured, tmp_path):
    def refused(match, models=(str(tiny_run),), **changes):
        with pytest.raises(UserError, match=match):
            evaluate(models, Settings(**SMALL | changes), tmp_path, cache=measured.cache, device="cpu")

    refused("did you mean 'midpoint'", solvers=("midpont",))
    refused("steps must be at least 1", steps=(0,))
    refused("steps must be at least 1", latent_steps=0)
    refused("did you mean 'mean'", latent_solver="meen")
    refused("unknown dtype", dtype="int8")
    refused("at least 10 images", num_images=3)
    refused("given twice", models=(str(tiny_run), str(tiny_run)))
    refused("no model", models=("/nowhere/run",))
    refused("cannot load the network", features=(str(tmp_path),))


def test_distances_by_hand_and_without_replicates():
    torch.manual_seed(0)
    network = ClassifierFeatures(SmallClassifier(1, 2), "cpu")
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(300, 4, generator=generator)
    same = distances(network, real.clone(), RealFeatures.of(real), replicates=0, seed=0)
    assert same["frechet"].value == pytest.approx(0, abs=1e-6)
    assert same["precision"].value == same["recall"].value == same["coverage"].value == 1
    apart = distances(network, real + 3, RealFeatures.of(real), replicates=20, seed=0)
    assert apart["frechet"].value == pytest.approx(36, rel=1e-3)
    assert apart["frechet"].low < 36 < apart["frechet"].high
    assert apart["coverage"].value < 0.05


def test_copies_are_found_and_named():
    generator = torch.Generator().manual_seed(0)
    train, unseen, new = (torch.randn(200, 3, generator=generator) for _ in range(3))
    generated = torch.cat([new[:150], train[50:100]])
    share, closest = copies(generated, RealFeatures.of(train), unseen, replicates=10, seed=0)
    assert 0.25 <= share.value < 0.35
    assert all(c["training_image"] == c["image"] - 100 for c in closest), "rows 150 to 199 copy 50 to 99"


def test_reconstruction_at_many_steps_is_the_flow_run_by_hand(tiny_run):
    pipeline = load_pipeline(tiny_run)
    y = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    request = Request("euler", 1, 1, 3, 2, "fp32")
    with torch.no_grad():
        z = pipeline.auxiliary.encode(y).mean
        x = pipeline.auxiliary.decode(z).at(image_noise((1, 16, 16), seed=3, indices=range(5), stream="x"))
        expected = (x + pipeline.flow(x, torch.zeros(()), z)).clamp(-1, 1)
    torch.testing.assert_close(reconstruct(pipeline, y, request), expected, atol=1e-5, rtol=0)


def test_reconstruction_by_the_average_velocity(tiny_mean_run):
    pipeline = load_pipeline(tiny_mean_run)
    y = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        z = pipeline.auxiliary.encode(y).mean
        x = pipeline.auxiliary.decode(z).at(image_noise((1, 16, 16), seed=3, indices=range(3), stream="x"))
        expected = (x + pipeline.flow(x, torch.zeros(()), z, None, torch.ones(()))).clamp(-1, 1)
    found = reconstruct(pipeline, y, Request("mean", 1, 1, 3, 2, "fp32"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_timings_count_evaluations_of_each_row(tiny_run):
    pipeline = load_pipeline(tiny_run)
    pipeline.set_progress_bar_config(disable=True)
    rows = [(pipeline, Request("midpoint", n, 4, 0, 4, "fp32", latent_steps=2)) for n in (1, 3)]
    found = timings(rows)
    assert [f["nfe"] for f in found] == [
        {"sampler": 4, "decoder": 1, "flow": 2},
        {"sampler": 4, "decoder": 1, "flow": 6},
    ]
    assert all(f["ms_per_image"][part] > 0 for f in found for part in ("total", "flow", "sampler", "decoder"))


def _row(model, kind, steps, ms, value):
    return {
        "model": model,
        "kind": kind,
        "solver": "heun3",
        "steps": steps,
        "latent_solver": None,
        "latent_steps": None,
        "nfe": {"flow": 3 * steps},
        "ms_per_image": {"total": ms, "flow": ms, "other": 0.0},
        "images_per_second": 1000 / ms,
        "metrics": {"f/mmd": {"value": value, "low": value - 0.5, "high": value + 0.5}},
    }


def test_tables_and_verdicts_of_given_rows():
    results = {
        "models": [{"name": n, "shape": [3, 8, 8]} for n in ("a", "b")],
        "rows": [
            _row("a", "LeDiFlowPipeline", 1, 2.0, 3.0),
            _row("a", "LeDiFlowPipeline", 2, 4.0, 1.0),
            _row("b", "FlowMatchingPipeline", 4, 12.0, 2.0),
        ],
        "real": [{"shape": [3, 8, 8], "floor": {}, "floor_images": 0}],
    }
    (says,) = verdicts(results, "f/mmd")
    assert "LeDiFlow with 2 heun3 steps (1)" in says
    assert "in 4.00 instead of 12.00 ms per image: 3.0 times the speed" in says
    assert "| a     | heun3  |     2 | 6 flow      |       4.00 |" in speed_table(results, "f/mmd")
    assert "1 [0.5, 1.5]" in quality_table(results)
    results["rows"][0] |= {"latent_solver": "mean", "latent_steps": 1}
    assert "| a     | heun3  |     1 | 1 mean step    |" in speed_table(results, "f/mmd")
    assert "| b     | heun3  |     4 |                |" in quality_table(results)
    results["models"][1]["shape"] = [3, 16, 16]
    assert verdicts(results, "f/mmd") == [], "models of another size do not compare"


def test_a_model_of_latents_is_known_before_its_codec_is_loaded(tiny_run):
    pipeline = load_pipeline(tiny_run)
    assert in_pixels(pipeline)
    pipeline.register_to_config(latent_space={"codec": "somewhere"})
    assert pipeline.vae is None
    assert not in_pixels(pipeline)
