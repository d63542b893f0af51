"""Clusters of z from the stage to the request, and guidance learned into one evaluation."""

import json
import math
import shlex

import pytest
import torch
from conftest import TINY, batch_of, context_of, digits_data, refused, step_noise
from PIL import Image

from lediflow.errors import UserError
from lediflow.evaluation.request import Settings, strength_words
from lediflow.evaluation.strengths import find_strengths
from lediflow.pipelines.load import load_pipeline
from lediflow.training.builders import build_stage
from lediflow.training.clusters import settle_clusters
from lediflow.training.config import load_config
from lediflow.training.run import train

STAGES = ("auxiliary", "clusters", "flow", "sampler", "weak-flow", "meanflow", "sampler-meanflow")
GUIDED = [
    *TINY,
    "clusters.count=3",
    "data.classes=10",
    "training.auxiliary.steps=30",
    "training.auxiliary.learning_rate=5e-3",
    "training.meanflow.autoguidance=[1,2]",
    "training.sampler_meanflow.guidance=[1,3]",
    *(f"training.weak_flow.{setting}" for setting in ("steps=2", "batch_size=8", "warmup_steps=1")),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clustered") / "run"
    return train(load_config("digits", GUIDED), folder, device="cpu", stages=STAGES)


@pytest.fixture(scope="module")
def pipe(run):
    pipeline = load_pipeline(run)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def unrefined(run):
    pipeline = load_pipeline(run / "flow")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("split", "count"), [("train", 16), ("validation", 8)])
def test_auto_grows_with_the_root_of_the_number_of_images(split, count):
    """0.4 * sqrt(1500) = 15.5 and 0.4 * sqrt(297) = 6.9."""
    config = load_config("digits", ["clusters.count=auto"])
    assert settle_clusters(config, digits_data(split=split)).clusters.count == count


def test_more_clusters_than_images_are_refused(digits):
    with pytest.raises(UserError, match="clusters.count 2000 is more than the 297 images"):
        settle_clusters(load_config("digits", ["clusters.count=2000"]), digits)


def test_zero_switches_the_stage_off():
    config = load_config("digits", ["clusters.count=0", "training.stages=[auxiliary, clusters, flow]"])
    assert [spec.name for spec in config.chosen(None)] == ["auxiliary", "flow"]
    with pytest.raises(UserError, match="stage clusters has nothing to learn: clusters.count is 0"):
        config.chosen(["clusters"])


@pytest.mark.parametrize(
    ("classes", "seed"), [("data.classes=0", 0), ("data.classes=10", -1), ("data.classes=0", 2**40)]
)
def test_k_means_explains_z_and_counts_every_image_once(classes, seed, digits):
    stage = build_stage("clusters", context_of(digits, "clusters.count=4", classes, f"training.seed={seed}"))
    stage.finish()
    z = torch.cat([stage._z(batch) for batch in stage.served_once("k-means")])[: len(digits)]
    found = stage.network.assign(z)
    assert torch.equal(stage.network.images.sum(0), found.bincount(minlength=4).float())
    assert stage.network.images.shape == ((10 if "10" in classes else 1), 4)
    assert stage.network.images.sum() == len(digits)
    within = (z - stage.network.centres[found]).square().mean()
    assert within < 0.9 * (z - z.mean(0)).square().mean(), "better than one centre"


def test_the_sampler_pairs_noise_and_z_within_a_cluster(digits):
    """Independent coupling gives every position its own noise; transport only moves it within clusters."""
    batch, settings = batch_of(digits, 32), ["clusters.count=3"]
    pairs, labels = {}, None
    for coupling in ("independent", "optimal-transport"):
        context = context_of(digits, *settings, f"training.sampler.coupling={coupling}")
        stage = build_stage("sampler", context)
        stage.coupling.clusters.assign = lambda z: torch.arange(len(z)) % 3
        with torch.no_grad():
            found = stage.coupling.pairs(batch, step_noise(32))
        pairs[coupling], labels = found.x.flatten(1), found.conditions["cluster"]
    assert not torch.equal(*pairs.values()) and len(labels.unique()) > 1
    for cluster in labels.unique():
        before, after = (x[labels == cluster].sort(0).values for x in pairs.values())
        assert torch.equal(before, after), "the same noise, dealt out anew"


def test_the_flow_is_told_clusters_only_where_the_config_says_so(digits):
    for networks, told in (("[sampler]", False), ("[sampler, flow]", True)):
        context = context_of(digits, "clusters.count=3", f"clusters.networks={networks}")
        flow, sampler = build_stage("flow", context), build_stage("sampler", context)
        assert sampler.network.classes("cluster") == 3
        assert flow.network.classes("cluster") == (3 if told else 0)
        _, conditions = flow.coupling.targets(batch_of(digits), step_noise())
        assert ("cluster" in conditions) is told


@pytest.mark.slow
def test_a_request_draws_clusters_by_seed_and_image(pipe):
    labels = pipe.labels_of(range(300), seed=5)
    assert torch.equal(pipe.labels_of([7, 3], seed=5)["cluster"], labels["cluster"][[7, 3]])
    assert not torch.equal(pipe.labels_of(range(300), seed=6)["cluster"], labels["cluster"])
    assert torch.equal(labels["label"], torch.arange(300) % 10)
    for digit in range(10):
        drawn = labels["cluster"][labels["label"] == digit].unique()
        assert (pipe.clusters.images[digit, drawn] > 0).all(), "as the digit's own training images"
    one = pipe(5, seed=5, output_type="pt").images
    torch.testing.assert_close(pipe(5, seed=5, output_type="pt", batch_size=2).images, one)
    chosen = pipe.labels_of(range(4), cluster=[2, 0])
    assert chosen["cluster"].tolist() == [2, 0, 2, 0]


@pytest.mark.slow
def test_what_a_request_cannot_ask_is_said_by_name(pipe, unrefined, run):
    with pytest.raises(UserError, match="cluster 3 is not one of this model's 0 to 2"):
        pipe(1, cluster=3)
    with pytest.raises(UserError, match="latent_guidance 4 is not among what this model learned, 1 to 3"):
        pipe(1, latent_guidance=4)
    with pytest.raises(UserError, match=r"autoguidance 0\.5 is not among what this model learned, 1 to 2"):
        pipe(1, autoguidance=0.5)
    for name, strength in (("latent_guidance", math.nan), ("guidance", math.inf)):
        with pytest.raises(UserError, match=f"^{name} must be a finite number"):
            unrefined(1, **{name: strength})
    with pytest.raises(UserError, match="latent_autoguidance 2 needs a weak network.*--stage weak-sampler"):
        unrefined(1, latent_autoguidance=2)
    empty = load_pipeline(run)
    empty.clusters.images[:, 1] = 0
    with pytest.raises(UserError, match="cluster 1 has no training images"):
        empty(1, cluster=1)
    empty.register_modules(clusters=None)
    with pytest.raises(UserError, match="trained without clusters"):
        empty(1, cluster=1)


@pytest.mark.slow
def test_learned_guidance_takes_one_evaluation_and_unlearned_two(pipe, unrefined):
    assert pipe(2, latent_guidance=2.5, autoguidance=1.5).nfe == {"sampler": 1, "decoder": 1, "flow": 1}
    plain = unrefined(2, steps=1, latent_steps=1)
    guided = unrefined(2, steps=1, latent_steps=1, latent_guidance=2.5, autoguidance=1.5)
    assert plain.nfe == {"sampler": 2, "decoder": 1, "flow": 2}
    assert guided.nfe == {"sampler": 4, "decoder": 1, "flow": 4}


@pytest.mark.slow
def test_the_best_strengths_are_found_kept_and_the_default(run):
    found = find_strengths(run, "cpu")
    assert list(found) == ["."] and set(found["."]) == {"latent_guidance", "autoguidance"}
    assert 1 <= found["."]["latent_guidance"] <= 3 and 1 <= found["."]["autoguidance"] <= 2
    pipeline = load_pipeline(run)
    settled = pipeline.settle_strengths()
    assert {name: settled[name] for name in found["."]} == found["."]
    assert pipeline.settle_strengths(latent_guidance=1.25)["latent_guidance"] == 1.25
    nothing = pipeline.settle_strengths(labels=[])
    assert nothing["latent_guidance"] == 1 and nothing["autoguidance"] == found["."]["autoguidance"]
    assert json.loads((run / "strengths.json").read_text())["."]["strengths"] == found["."]
    assert find_strengths(run, "cpu") == {}, "not searched again"


@pytest.mark.slow
def test_a_stage_that_is_done_at_once_resumes_as_any(run):
    folder = run / "clusters" / "checkpoints" / "step-1"
    before = folder.stat().st_mtime_ns
    train(load_config("digits", GUIDED), run, device="cpu", stages=["clusters", "sampler"])
    assert folder.stat().st_mtime_ns == before
    assert (run / "clusters" / "previews" / "step-000001.png").exists()


@pytest.mark.slow
def test_editing_keeps_a_picture_in_its_cluster(unrefined):
    """A variant is made of w as inverted within the cluster, so at a strength near 0 nothing changes."""
    y = digits_data().first(1)
    z = unrefined.encode(y).mean
    told = unrefined.of_cluster(unrefined.labels_of([0]), z)
    assert told["cluster"].tolist() == unrefined.clusters.assign(unrefined.auxiliary.standardize(z)).tolist()
    few = {"latent_solver": "dopri5", "seed": 0, "output_type": "pt", "constant_noise": True}
    still = unrefined.vary(y, strength=1e-6, num_images=1, **few).images
    same = unrefined.vary(y, strength=0.0, num_images=1, **few).images
    torch.testing.assert_close(still, same, rtol=0, atol=2e-2)


@pytest.mark.slow
def test_the_command_shows_every_cluster(run, lediflow, tmp_path):
    picture = tmp_path / "clusters.png"
    report = json.loads(lediflow("clusters", run, "-o", picture, "--columns", 2, "--json").stdout)
    assert sum(report["clusters"]) == 1500 and len(report["clusters"]) == 3
    rows = sum(count > 0 for count in report["clusters"])
    assert Image.open(picture).height >= rows * 48
    refused(lediflow("clusters", run, "--columns", 0), "--columns must be at least 1")


@pytest.mark.slow
def test_samples_of_a_cluster_by_the_command(run, lediflow, tmp_path):
    out = tmp_path / "two"
    done = lediflow("sample", run, "-n", 3, "--cluster", "2,0", "--latent-guidance", 2, "--json", "-o", out)
    report = json.loads(done.stdout)
    assert report["cluster"] == ["2", "0"] and report["latent_guidance"] == 2
    with Image.open(out / "000000.png") as image:
        command = shlex.split(image.text["command"])[1:]
    again = lediflow(*command, "--json", "-o", out)
    assert json.loads(again.stdout)["found"] == 3, "the command in the pictures asks for the same"
    refused(lediflow("sample", run, "--cluster", 9, "-o", tmp_path / "x"), "cluster 9 is not one of")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.meanflow.guidance=[1,2]", "training.meanflow.guidance needs classes .* flow in clusters"),
        ("training.sampler_meanflow.guidance=[1,2]", "training.sampler_meanflow.guidance needs classes"),
    ],
)
def test_guidance_with_nothing_to_guide_by_is_refused_before_anything_is_made(setting, message, tmp_path):
    config = load_config("digits", [*TINY, setting])
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run", device="cpu", stages=["sampler-meanflow", "meanflow"])
    assert not (tmp_path / "run").exists()
    for bounds in ("[2,1]", "[1,1]", "[1.5,3]", "[1,.inf]"):
        with pytest.raises(UserError, match="low <= 1 <= high and low < high"):
            load_config("digits", [f"training.meanflow.guidance={bounds}"])


def test_without_an_auxiliary_model_no_strength_is_searched_for(tmp_path, capsys):
    learned = ("data.classes=10", "training.baseline_meanflow.guidance=[1,2]")
    stages = ["baseline", "baseline-meanflow"]
    run = train(load_config("digits", [*TINY, *learned]), tmp_path / "run", device="cpu", stages=stages)
    assert find_strengths(run, device="cpu") == {}
    assert "baseline-meanflow: the best strengths are not searched for" in capsys.readouterr().err


@pytest.mark.slow
def test_an_evaluation_has_a_row_for_every_strength(pipe, unrefined):
    settings = Settings(data="digits", latent_guidance=(1.0, 2.0), autoguidance=(1.5,))
    for pipeline in (pipe, unrefined):
        rows = settings.strengths(pipeline)
        assert [(row["latent_guidance"], row["autoguidance"]) for row in rows] == [(1.0, 1.5), (2.0, 1.5)]
    with pytest.raises(UserError, match="latent_guidance 9 is not among"):
        Settings(data="digits", latent_guidance=(9.0,)).strengths(pipe)
    words = strength_words({"latent_guidance": 2.0, "autoguidance": 1.5, "guidance": 1.0})
    assert words == "w 1.5, latent g 2"


def test_clusters_are_found_along_where_a_stage_is_told_them(tmp_path):
    config = load_config("digits", [*TINY, "clusters.count=4"])
    run = train(config, tmp_path / "run", device="cpu", stages=["auxiliary", "flow", "sampler"])
    found = (run / "clusters" / "checkpoints").stat().st_mtime_ns
    assert load_pipeline(run).components["clusters"].config.count == 4
    train(config, run, device="cpu", stages=["sampler"])
    assert (run / "clusters" / "checkpoints").stat().st_mtime_ns == found, "once"


def test_a_stage_that_lacks_another_is_refused_before_any_is_trained(tmp_path):
    config = load_config("digits", [*TINY, "training.meanflow.autoguidance=[1,2]"])
    with pytest.raises(UserError, match="no trained weak-flow stage yet"):
        train(config, tmp_path / "run", device="cpu", stages=["auxiliary", "flow", "meanflow"])
    assert not (tmp_path / "run").exists()
