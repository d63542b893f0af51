"""A whole evaluation on a run of six steps, and what it keeps."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lediflow.errors import UserError
from lediflow.evaluation import evaluate as module
from lediflow.evaluation.evaluate import evaluate
from lediflow.evaluation.request import Settings

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
    results = evaluate(models, asked, tmp_path, **at, overwrite=True)
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


def test_what_was_measured_is_not_measured_again_and_another_report_is_not_replaced(
    measured, monkeypatch, tmp_path
):
    calls = []
    features, times = module.generated_features, module.timings
    monkeypatch.setattr(module, "generated_features", lambda *a: calls.append(a[1].steps) or features(*a))
    monkeypatch.setattr(module, "timings", lambda rows: calls.append("times") or times(rows))
    again = evaluate(measured.models, Settings(**SMALL), measured.out, cache=measured.cache, device="cpu")
    assert calls == []
    assert again == measured.results
    out = shutil.copytree(measured.out, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    at = {"cache": measured.cache, "device": "cpu"}

    def refused(match, models=measured.models, **changes):
        with pytest.raises(UserError, match=match + ".*--overwrite"):
            evaluate(models, Settings(**SMALL | changes), out, **at)
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before

    refused(r"the report of another request \(seed: 0 there, 1 now\)", seed=1)
    refused(r"models: tiny/baseline \(weights \w+\) there, nothing more now", measured.models[:1])
    refused(r"rows: nothing more there, tiny, 4 midpoint steps .*, tiny/baseline, 4 mid", steps=(1, 2, 4))
    refused("validation: None there, digits now", validation="digits")
    more = Settings(**SMALL | {"steps": (1, 2, 4)})
    evaluate(measured.models[:1], more, out, **at, overwrite=True)
    assert calls == [4, "times"], "rows that fit are kept"
    assert not (out / "closest-tiny-baseline.png").exists(), "nothing is left of the other report"
    assert "closest-tiny-baseline.png" in before


def test_an_unfinished_evaluation_of_another_request_is_no_report(measured, tmp_path):
    out = shutil.copytree(measured.out, tmp_path / "out")
    for name in ("results.json", "table.md", "report.html"):
        (out / name).unlink()
    for path in out.glob("*.png"):
        path.unlink()
    (out / f".results-{'0' * 32}.json").write_text("half")
    few = Settings(**SMALL | {"steps": (1,)})
    evaluate(measured.models, few, out, cache=measured.cache, device="cpu")
    assert json.loads((out / "request.json").read_text())["rows"][0].startswith("tiny, 1 midpoint step ")
    assert not list(out.rglob(".*"))


def test_a_killed_evaluation_resumes_with_the_rows_it_has(measured, monkeypatch, tmp_path):
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
        copied = [{c["image"]: c["training_image"] for c in row["closest"]} for row in (ours, theirs)]
        assert copied[0] == copied[1], "the images of both processes stand in their order"


def test_notes_say_where_counts_mislead(tiny_run, measured, tmp_path):
    settings = Settings(**SMALL | {"steps": (1,), "num_images": 320, "bootstrap": 0})
    results = evaluate([str(tiny_run)], settings, tmp_path, cache=measured.cache, device="cpu")
    notes = " ".join(results["notes"])
    assert "only 200 real images stand against 320" in notes
    assert "the floor is measured with 200" in notes
    estimate = results["rows"][0]["metrics"]["classifier/frechet"]
    assert estimate["low"] == estimate["high"]
    few = Settings(**SMALL | {"steps": (1,), "num_images": 40})
    results = evaluate([str(tiny_run)], few, tmp_path / "few", cache=measured.cache, device="cpu")
    assert any("40 samples do not determine a covariance" in note for note in results["notes"])


def test_default_features_fall_back_to_the_classifier_and_say_so(tiny_run, measured, monkeypatch, tmp_path):
    def unreachable(name, revision):
        raise UserError(f"{name} is not cached here")

    monkeypatch.setattr("lediflow.metrics.features._check_reachable", unreachable)
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


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    tiny_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "open_real_side", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --output"):
        evaluate([str(tiny_run)], Settings(**SMALL), tmp_path / "file", device="cpu")
