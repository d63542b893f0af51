"""Words, from a column of the data to the images of a prompt."""

import json
import shutil

import pytest
import torch
from conftest import TINY, batch_of, context_of, digits_data, randomized, refused, step_noise
from PIL import Image

from lediflow.conditions import Conditions
from lediflow.data.images import ImageData
from lediflow.data.listing import open_dataset
from lediflow.errors import UserError
from lediflow.evaluation.request import Request, Settings, drawn_prompts, texts_of
from lediflow.networks.text import text_bytes
from lediflow.pipelines.load import load_pipeline
from lediflow.training.builders import build_network, build_stage
from lediflow.training.config import load_config
from lediflow.training.run import train
from lediflow.training.stages import STAGES as TABLE

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STAGES = ("auxiliary", "clusters", "flow", "sampler", "sampler-meanflow", "baseline")
WORDED = ["text.encoder=characters", "text.max_length=16", "text.width=8"]
TOLD = [
    *TINY,
    *WORDED,
    "text.networks=[sampler,baseline]",
    "data.classes=10",
    "clusters.count=2",
    "training.sampler.learning_rate=1e-2",
    "training.sampler_meanflow.guidance=[1,3]",
]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The held-out digits with their names in words."""
    rows = open_dataset("digits", "validation")
    rows = rows.add_column("text", [f"a {NAMES[label]}" for label in rows["label"]])
    folder = tmp_path_factory.mktemp("names")
    rows.to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def run(names, tmp_path_factory):
    folder = tmp_path_factory.mktemp("worded") / "run"
    config = load_config("digits", [*TOLD, f"data.train={names}"])
    return train(config, folder, device="cpu", stages=STAGES)


@pytest.fixture(scope="module")
def pipe(run):
    pipeline = load_pipeline(run)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def worded_data(names, **options):
    return ImageData(str(names), image_size=16, channels=1, texts=("text", "caption"), **options)


def stage_of(names, name, *settings):
    context = context_of(worded_data(names), *WORDED, "text.networks=[sampler,flow,baseline]", *settings)
    return build_stage(name, context)


def told_bytes(row):
    return bytes(row[row > 0].tolist()).decode()


# The data


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_texts_belong_to_their_images(names, cache_gb):
    data = worded_data(names, cache_gb=cache_gb)
    assert data.texts == [f"a {NAMES[label]}" for label in data.labels.tolist()]


def test_texts_of_broken_images_go_with_them(tmp_path):
    import datasets

    picture = {"bytes": open_dataset("digits", "validation")[0]["image"]["bytes"], "path": None}
    columns = {
        "image": [picture, {"bytes": b"no", "path": None}, picture],
        "caption": ["one", "two", None],
    }
    datasets.Dataset.from_dict(
        columns,
        features=datasets.Features(
            {"image": datasets.Image(decode=False), "caption": datasets.Value("string")}
        ),
    ).to_parquet(tmp_path / "x.parquet")
    with pytest.warns(UserWarning, match="left out"):
        data = worded_data(tmp_path)
    assert data.texts == ["one", ""], "an image without a text has an empty one"


def test_names_of_classes_are_texts_too():
    data = digits_data(texts=("label",))
    assert data.texts == [str(label) for label in data.labels.tolist()]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_folder_says_in_its_metadata_what_its_images_show(kind, tmp_path):
    for name in ("a.png", "below/b.png", "c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (16, 16)).save(tmp_path / name)
    rows = [("below/b.png", 'blue, "dark"'), ("a.png", "red")]
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    else:
        lines = ["file_name,text", 'below/b.png,"blue, ""dark"""', "a.png,red"]
    (tmp_path / f"metadata.{kind}").write_text("\n".join(lines))
    data = worded_data(tmp_path)
    assert data.texts == ["red", 'blue, "dark"', ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no texts in .* give it a metadata.jsonl"),
        (
            '{"file_name": "a.png", "words": "red"}',
            "no column text or caption of texts in .* file_name, words",
        ),
        ('{"text": "red"}', "no column file_name of texts"),
        ("{", "cannot read .*metadata.jsonl"),
        ("[1]", "cannot read .*metadata.jsonl|no column"),
    ],
)
def test_a_folder_without_texts_is_refused(content, message, tmp_path):
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    if content is not None:
        (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        worded_data(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "no column text or caption of texts in 'digits': its columns are image, label"),
        (["text.column=words"], "no column words of texts"),
        (["data.streaming=true"], "data.streaming does not go with texts"),
    ],
)
def test_data_without_texts_are_refused_before_anything_is_made(settings, message, tmp_path):
    config = load_config("digits", [*TINY, *WORDED, *settings])
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run", device="cpu", stages=["auxiliary"])
    assert not (tmp_path / "run").exists()


# Training


def test_no_preset_has_texts_and_no_network_is_told_without():
    config = load_config("digits")
    assert config.text.encoder is None and config.text.columns == ()
    assert not any(config.text.told(network) for network in ("sampler", "flow", "baseline"))
    assert "text" not in build_network(TABLE["sampler"], config).config.conditions


@pytest.mark.parametrize(("network", "stage"), [("sampler", "sampler"), ("flow", "flow")])
def test_only_the_networks_that_are_named_are_told(network, stage):
    config = load_config("digits", [*TINY, *WORDED, f"text.networks=[{network}]"])
    for name in ("sampler", "flow", "baseline"):
        assert ("text" in build_network(TABLE[name], config).config.conditions) == (name == stage)


@pytest.mark.parametrize("name", ["sampler", "flow", "baseline"])
def test_a_batch_tells_the_texts_of_its_images(names, name):
    stage = stage_of(names, name, "data.classes=10")
    batch = batch_of(stage.context.data)
    _, conditions = stage.coupling.targets(batch, step_noise())
    assert [told_bytes(row) for row in conditions["text"]] == [
        f"a {NAMES[i]}" for i in batch["label"].tolist()
    ]
    assert torch.isfinite(stage.loss(stage.network, batch, step_noise())[0])


def test_a_share_of_texts_goes_alone_a_share_stays_alone_and_a_share_goes_with_the_class(names):
    settings = ["data.classes=10", "text.dropout=0.25", "training.label_dropout=0.2", "text.word_dropout=0"]
    stage = stage_of(names, "baseline", *settings)
    count = 4000
    told = Conditions(label=torch.zeros(count, dtype=torch.long), text=text_bytes(["cat"] * count, 16))
    given = stage.given(told, step_noise(count))
    text, label = given.dropped["text"], given.dropped["label"]
    shares = [(text & label), (text & ~label), (~text & label), (~text & ~label)]
    measured = torch.stack([share.float().mean() for share in shares])
    expected = torch.tensor([0.2, 0.8 * 0.25, 0.8 * 0.25, 0.8 * 0.5])
    assert (measured - expected).abs().max() < 0.03


def test_without_classes_a_text_goes_as_often_as_guidance_needs(names):
    stage = stage_of(names, "baseline", "data.classes=0", "text.dropout=0.4")
    given = stage.given(Conditions(text=text_bytes(["cat"] * 4000, 16)), step_noise(4000))
    assert abs(given.dropped["text"].float().mean() - 0.1) < 0.02


def test_words_are_left_out_image_by_image(names):
    stage = stage_of(names, "baseline", "text.word_dropout=0.3")
    told = Conditions(text=text_bytes(["red heart wings"] * 2000, 16))
    left = [told_bytes(row).split() for row in stage.given(told, step_noise(2000))["text"]]
    for word in ("red", "heart", "wings"):
        share = sum(word not in row for row in left) / len(left)
        assert abs(share - (0.3 - 0.3**3)) < 0.03, "a text that would lose all words keeps them"
    again = [told_bytes(row).split() for row in stage.given(told.rows(slice(0, 8)), step_noise(8))["text"]]
    assert again == left[:8], "what image p loses does not depend on the size of the batch"


def test_optimal_transport_never_deals_noise_from_one_text_to_another():
    told = Conditions(label=torch.tensor([0, 0, 1]), text=text_bytes(["a", "b", "a"], 4))
    assert len(told.kinds().unique()) == 3
    assert told.rows([0, 0, 1]).kinds().tolist() == [0, 0, 1]


def test_guidance_leaves_out_text_and_class_at_once(names):
    from lediflow.training.teacher import Teacher

    settings = ["training.sampler_meanflow.guidance=[1,3]", "data.classes=10"]
    stage = stage_of(names, "sampler-meanflow", *settings)
    batch = batch_of(stage.context.data)
    _, conditions = stage.coupling.targets(batch, step_noise())
    told, options = stage.teacher._guidance(stage.teacher.strengths(conditions, step_noise()))
    assert isinstance(stage.teacher, Teacher) and options["drop"] == ["label", "text"]
    assert set(told) == {"label", "text"}
    assert torch.isfinite(stage.loss(stage.network, batch, step_noise())[0])


# Sampling


def test_a_trained_pipeline_is_told_texts_and_brings_its_encoder(run, pipe):
    assert pipe.reader is pipe.sampler and "text" not in pipe.flow.config.conditions
    labels = pipe.labels_of(range(3), prompt=["a one", "A TWO!"])
    assert list(labels) == ["text"]
    assert [told_bytes(row) for row in labels["text"]] == ["a one", "a two", "a one"]
    assert sum(p.numel() for p in pipe.sampler.embedders["text"].parameters()) > 2**14 * 8


def test_a_prompt_changes_images_and_class_and_cluster_go_beside_it(pipe):
    def made(**told):
        return pipe(2, output_type="pt", latent_guidance=2.0, **told).images

    assert not torch.equal(made(prompt="a one"), made(prompt="a seven"))
    assert list(pipe.labels_of([0], "3", prompt="a three", cluster=1)) == ["label", "cluster", "text"]
    assert not torch.equal(made(prompt="a one"), made(prompt="a one", class_labels=3))
    assert list(pipe.labels_of([0])) == ["label", "cluster"], "without a prompt as before"


def test_an_image_depends_on_its_own_prompt_only(pipe):
    prompts = ["a one", "a two", "a three"]
    whole = pipe(6, prompt=prompts, output_type="pt").images
    part = pipe(2, prompt=prompts, first_image=4, output_type="pt").images
    torch.testing.assert_close(part, whole[4:], rtol=0, atol=1e-5)
    alone = pipe(1, prompt="a two", first_image=4, output_type="pt").images
    torch.testing.assert_close(alone, whole[4:5], rtol=0, atol=1e-5)


def test_an_empty_prompt_is_none_at_all(run):
    pipe = load_pipeline(run)
    randomized(pipe.sampler)
    w = pipe.noise(pipe.auxiliary.z_shape, range(2), 0, "w")
    empty = pipe.sample_z(w, pipe.labels_of(range(2), prompt="")).end
    torch.testing.assert_close(empty, pipe.sample_z(w).end)
    guided = pipe.sample_z(w, pipe.labels_of(range(2), prompt="a one")).end
    assert (guided - empty).abs().max() > 1e-6


def test_guidance_by_text_alone_is_two_evaluations_of_an_unrefined_model(run):
    pipeline = load_pipeline(run / "flow")
    pipeline.set_progress_bar_config(disable=True)
    options = {"latent_solver": "euler", "latent_steps": 2, "solver": "euler", "steps": 1}
    assert pipeline(1, prompt="a one", latent_guidance=2.0, **options).nfe["sampler"] == 4
    assert pipeline(1, prompt="a one", **options).nfe["sampler"] == 2
    with pytest.raises(UserError, match="guidance 2 needs a class, cluster or text that the network is told"):
        pipeline(1, prompt="a one", guidance=2.0, **options)


def test_the_best_strength_of_a_network_that_is_told_nothing_is_not_used(run):
    pipeline = load_pipeline(run / "flow")
    pipeline.register_to_config(strengths={"guidance": 1.5, "latent_guidance": 2.0})
    settled = pipeline.settle_strengths(labels=["text"])
    assert settled["guidance"] == 1 and settled["latent_guidance"] == 2
    assert pipeline.settle_strengths()["guidance"] == 1.5
    assert pipeline.settle_strengths(labels=[])["latent_guidance"] == 1


def test_plain_flow_matching_takes_prompts(run):
    pipeline = load_pipeline(run / "baseline")
    pipeline.set_progress_bar_config(disable=True)
    options = {"steps": 1, "solver": "euler", "output_type": "pt"}
    one, two = (pipeline(1, prompt=text, guidance=3.0, **options) for text in ("a one", "a two"))
    assert not torch.equal(one.images, two.images) and one.nfe == {"flow": 2}


def test_impossible_prompts_are_refused_and_long_ones_cut_with_a_warning(pipe, tiny_run):
    with pytest.raises(UserError, match="this model was trained without text"):
        load_pipeline(tiny_run)(1, prompt="a one")
    with pytest.raises(UserError, match="at least one prompt"):
        pipe(1, prompt=[])
    with pytest.raises(UserError, match="a prompt is a text, not 7"):
        pipe(1, prompt=[7])
    with pytest.warns(UserWarning, match="a prompt is cut after 16 bytes"):
        cut = pipe(1, prompt="one two three four five", output_type="pt").images
    assert torch.equal(cut, pipe(1, prompt="one two three four five"[:16], output_type="pt").images)


def test_a_run_without_the_section_resumes_and_loads(run, tmp_path):
    """A run folder of an earlier version says nothing of texts."""
    import yaml

    from lediflow.training.config import load_run_config

    copy = tmp_path / "run"
    copy.mkdir()
    settings = yaml.safe_load((run / "config.yaml").read_text())
    del settings["text"]
    (copy / "config.yaml").write_text(yaml.safe_dump(settings))
    assert load_run_config(copy).text.encoder is None


# Evaluation


def test_an_evaluation_makes_the_datas_own_texts_each_by_seed_and_index(names, pipe, tiny_run):
    settings = Settings(data=str(names), num_images=12)
    assert settings.drawn_from(pipe) == str(names)
    assert settings.drawn_from(load_pipeline(tiny_run)) is None
    assert Settings(data=str(names), prompts=False).drawn_from(pipe) is None
    texts = texts_of(str(names))
    assert len(texts) == 297 and set(texts) == {f"a {name}" for name in NAMES}
    drawn = drawn_prompts(texts, range(1000), 3)
    assert drawn[5:8] == drawn_prompts(texts, range(5, 8), 3) != drawn_prompts(texts, range(5, 8), 4)
    assert all(70 < drawn.count(f"a {name}") < 130 for name in NAMES)


def test_a_rows_images_are_those_of_its_prompts_however_they_are_cut(names, pipe):
    settled = pipe.settle(steps=1, latent_steps=1)
    request = Request(**settled, num_images=5, seed=3, batch_size=2, dtype="fp32", prompts=str(names))
    whole = request.images(pipe, range(5)).images
    part = request.images(pipe, range(3, 5)).images
    torch.testing.assert_close(part, whole[3:], rtol=0, atol=1e-5)
    prompt = drawn_prompts(texts_of(str(names)), [4], 3)
    alone = pipe(1, seed=3, first_image=4, prompt=prompt, output_type="pt", **settled).images
    torch.testing.assert_close(alone, whole[4:], rtol=0, atol=1e-5)


# The command line


def test_the_command_keeps_the_prompt_and_makes_it_again(lediflow, run, tmp_path):
    prompts = ["--prompt", "a one", "--prompt", 'two, "dark"']
    out = tmp_path / "made"
    done = lediflow("sample", run, "-n", 3, *prompts, "--json", "-o", out)
    report = json.loads(done.stdout)
    assert report["prompt"] == ["a one", 'two, "dark"']
    with Image.open(out / "000001.png") as png:
        assert "--prompt 'a one' --prompt 'two, \"dark\"'" in png.text["command"]
    again = lediflow("sample", "--again", out / "000001.png", "-o", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    (made,) = [p for p in (tmp_path / "again").rglob("*.png") if p.name != "grid.png"]
    assert made.read_bytes() and Image.open(made).tobytes() == Image.open(out / "000001.png").tobytes()


def test_a_command_without_prompt_says_nothing_of_prompts(lediflow, run, tiny_run, tmp_path):
    done = lediflow("sample", run, "-n", 1, "--json", "-o", tmp_path / "x")
    assert "prompt" not in json.loads(done.stdout)
    refused(
        lediflow("sample", tiny_run, "--prompt", "a one", "-o", tmp_path / "y"),
        "this model was trained without text",
    )
    assert not (tmp_path / "y").exists()


def test_a_saved_pipeline_needs_nothing_else_for_a_prompt(pipe, run, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "moved")
    loaded = load_pipeline(tmp_path / "moved")
    loaded.set_progress_bar_config(disable=True)
    images = [p(1, prompt="a one", output_type="pt").images for p in (pipe, loaded)]
    assert torch.equal(*images)


def test_columns_are_joined(tmp_path, names):
    import pyarrow.parquet as pq

    table = pq.read_table(names)
    path = tmp_path / "styled.parquet"
    pq.write_table(table.append_column("style", [["bold"] * len(table)]), path)
    plain = ImageData(str(names), image_size=16, channels=1, texts=("text",))
    both = ImageData(str(path), image_size=16, channels=1, texts=("text+style",))
    assert both.texts == [f"{text} bold".strip() for text in plain.texts]
    with pytest.raises(UserError, match=r"no column text\+style of texts"):
        ImageData(str(names), image_size=16, channels=1, texts=("text+style",))
