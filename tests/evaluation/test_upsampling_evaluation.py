"""Upsamplers measured on held-out images: each stage by its own way, filters, parts, the path."""

import pytest
import torch

from lediflow.errors import UserError
from lediflow.evaluation.upsampling import HeldOut, along_the_path, measure, of_filter, of_stage
from lediflow.metrics.features import ClassifierFeatures
from lediflow.metrics.pairs import psnr
from lediflow.training.run_pipelines import finished_stages
from lediflow.upsampling import noised


@pytest.fixture(scope="module")
def held(tiny_upsampler_run):
    return HeldOut(tiny_upsampler_run, "digits", count=10, batch_size=4)


def test_every_start_is_trained_and_measured_by_its_own_way(held, tiny_upsampler_run):
    evaluations = {}
    for name in finished_stages(tiny_upsampler_run):
        if name != "upsampler-prior":
            stage = held.stage(name)
            row, shown = measure(held, stage, of_stage(held, stage, 3))
            evaluations[name] = row["evaluations"]
            assert shown.shape == (4, 1, 16, 16) and shown.dtype == torch.uint8
            assert row["psnr"] > 0 and row["ms"] == pytest.approx(
                sum(row[f"ms {p}"] for p in ("start", "network", "codec"))
            )
    assert evaluations == {
        "upsampler": 3,
        "upsampler-meanflow": 3,
        "upsampler-regression": 1,
        "upsampler-diffusion": 3,
        "upsampler-learned": 3,
        "upsampler-learned-meanflow": 3,
    }


def test_pairs_are_whole_and_the_same_each_time(held):
    stage = held.stage("upsampler")
    first, again = next(held.pairs(stage)), next(held.pairs(stage))
    assert first.y.shape == (4, 1, 16, 16) and first.low.shape == (4, 1, 4, 4)
    assert torch.equal(first.conditions["image"], again.conditions["image"])
    x = held.start(stage, first)
    assert torch.equal(x, held.start(stage, again))
    parts = [pair.first for pair in held.pairs(stage)]
    assert parts == [0, 4, 8]
    still = noised(first.conditions["image"], torch.zeros(4), torch.zeros_like(x))
    assert 0.1 < (x - still).std() < 0.5


def test_filters_are_floors_and_distances_have_their_names(held):
    stage = held.stage("upsampler")
    scores = {
        name: measure(held, stage, of_filter(name))[0]["psnr"] for name in ("nearest", "bicubic", "lanczos")
    }
    assert scores["nearest"] < min(scores["bicubic"], scores["lanczos"])
    pair = next(held.pairs(stage))
    near, _, _ = of_filter("nearest")(pair)
    torch.testing.assert_close(near, pair.conditions["image"])
    lanczos, _, _ = of_filter("lanczos")(pair)
    assert lanczos.shape == pair.high.shape and psnr(lanczos, pair.high).mean() > 10


def test_distances_of_the_images_themselves_are_none(held):
    from lediflow.metrics.classifier import SmallClassifier

    torch.manual_seed(0)
    features = ClassifierFeatures(SmallClassifier(channels=1, num_classes=2).eval(), "cpu")
    stage = held.stage("upsampler")
    row, _ = measure(held, stage, lambda pair: (pair.high, 0, {}), features, patch=8)
    names = {f"{which}{kind}" for which in ("", "patch ") for kind in ("frechet", "mmd")}
    assert names < row.keys() and all(abs(row[name]) < 1e-2 for name in names)
    blurred, _ = measure(held, stage, of_filter("nearest"), features, patch=8)
    assert all(blurred[name] > row[name] + 1e-6 for name in ("frechet", "patch frechet"))


def test_the_path_leads_from_the_start_to_the_end(held):
    stage = held.stage("upsampler")
    path = along_the_path(held, stage, steps=4, images=2)
    pair = next(held.pairs(stage))
    x = held.start(stage, pair)[:2]
    assert len(path) == 3
    torch.testing.assert_close(path[0], x.clamp(-1, 1))
    end = stage.carry(x, pair.conditions.rows(slice(2)), 4)
    torch.testing.assert_close(path[-1], end.clamp(-1, 1))


def test_a_run_without_an_upsampler_is_refused(tiny_run, tmp_path):
    import shutil

    import yaml

    shutil.copytree(tiny_run, run := tmp_path / "run")
    tree = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**tree, "upsampler": None}))
    with pytest.raises(UserError, match="this config has no section 'upsampler'"):
        HeldOut(run, "digits", count=1)
