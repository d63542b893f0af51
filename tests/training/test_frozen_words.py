"""A frozen text encoder, from a folder and a column of texts to the images of a prompt."""

import json
import shutil

import pytest
import torch
from conftest import TINY, batch_of, randomized, refused, step_noise
from PIL import Image
from tiny_texts import write_clip, write_t5

from lediflow.conditions import Conditions
from lediflow.data.images import ImageData
from lediflow.data.listing import open_dataset
from lediflow.errors import UserError
from lediflow.evaluation.request import Request
from lediflow.pipelines.load import load_pipeline
from lediflow.text_encoders import TextEncoder
from lediflow.training import texts
from lediflow.training.builders import build_network, build_stage
from lediflow.training.config import load_config, load_run_config
from lediflow.training.couplings import Context
from lediflow.training.rehearsal import rehearse
from lediflow.training.run import train
from lediflow.training.stages import STAGES as TABLE

# all that the tiny tokenizers know are a, c and t; the first image has no text
NAMES = ("a", "c", "t", "cat", "act", "a cat", "tact", "a t", "c a t", "at")
STAGES = ("auxiliary", "flow", "sampler", "sampler-meanflow", "baseline")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "lediflow" / "texts"


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The held-out digits, each with the words of its class."""
    rows = open_dataset("digits", "validation")
    said = [NAMES[label] for label in rows["label"]]
    folder = tmp_path_factory.mktemp("names")
    rows.add_column("text", ["", *said[1:]]).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("encoders") / "tiny-clip")


def settings_of(names, encoder, *more):
    return [
        *TINY,
        f"data.train={names}",
        f"text.encoder={encoder}",
        "text.max_length=6",
        "data.classes=10",
        "training.sampler.learning_rate=1e-2",
        *more,
    ]


@pytest.fixture(scope="module")
def told(names, clip):
    more = [
        "text.tokens=true",
        "text.networks=[sampler,baseline]",
        "training.sampler_meanflow.guidance=[1,3]",
    ]
    return settings_of(names, clip, *more)


@pytest.fixture(scope="module")
def run(told, tmp_path_factory):
    return train(
        load_config("digits", told), tmp_path_factory.mktemp("frozen") / "run", device="cpu", stages=STAGES
    )


@pytest.fixture
def pipe(run):
    return quiet(load_pipeline(run))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def calls(monkeypatch):
    """The texts that an encoder was asked for from now on."""
    asked, encode = [], TextEncoder.encode

    def counted(self, texts, *arguments, **options):
        asked.extend(texts)
        return encode(self, texts, *arguments, **options)

    monkeypatch.setattr(TextEncoder, "encode", counted)
    return asked


def context_of(settings):
    """What the stages share, as `train` makes it, with random networks for those that are finished."""
    from conftest import CPU, random_network

    from lediflow.training.processes import make_accelerator

    config = load_config("digits", settings)
    accelerator = make_accelerator(config.training, "cpu")
    config, encoder = texts.settle_text(config, accelerator)
    data = ImageData(str(config.data.train), image_size=16, channels=1, texts=config.text.columns)
    encoded = encoder.encode(config, data.texts, accelerator)
    return Context(config, data, CPU, lambda stage: random_network(config, stage), encoded)


# Settings


def test_the_encoder_says_how_wide_it_is_and_how_much_it_reads(run, clip):
    text = load_run_config(run).text
    assert text.frozen and (text.width, text.max_length) == (8, 6)
    told = build_network(TABLE["sampler"], load_run_config(run)).config.conditions["text"]
    assert told == {"embedder": "encoded", "length": 6, "features": 8, "tokens": True}
    assert json.loads((run / texts.RECORD).read_text()) == TextEncoder.load(clip).record()


def test_tokens_need_a_frozen_encoder_and_a_global_level(names, clip):
    with pytest.raises(UserError, match="text.tokens needs a frozen encoder"):
        load_config("digits", [*TINY, "text.encoder=characters", "text.tokens=true"])
    config = load_config("digits", settings_of(names, clip, "text.tokens=true", "sampler.global_levels=0"))
    with pytest.raises(UserError, match="global_levels to 1 or more, or text.tokens=false"):
        build_network(TABLE["sampler"], config)


def test_an_encoder_that_is_not_there_is_refused_before_anything_is_made(names, tmp_path):
    config = load_config("digits", settings_of(names, tmp_path / "none"))
    with pytest.raises(UserError, match="no text encoder"):
        train(config, tmp_path / "run", device="cpu", stages=["auxiliary"])
    assert not (tmp_path / "run").exists()


def test_a_rehearsal_reads_the_encoder_and_encodes_nothing(told, calls):
    report = rehearse(load_config("digits", told), ["auxiliary", "flow", "sampler"], "cpu")
    assert [stage.stage for stage in report["stages"]] == ["auxiliary", "flow", "sampler"] and not calls


# Training


@pytest.mark.parametrize("name", ["sampler", "baseline"])
def test_a_batch_tells_what_the_encoder_makes_of_its_texts(told, clip, name):
    context = context_of(told)
    stage = build_stage(name, context)
    batch = batch_of(context.data)
    _, conditions = stage.coupling.targets(batch, step_noise())
    said = [context.data.texts[i] for i in batch["index"].tolist()]
    expected = TextEncoder.load(clip).encode(said, 6, tokens=True)
    torch.testing.assert_close(conditions["text"], expected, rtol=0, atol=2e-3)
    assert torch.isfinite(stage.learn(stage.network, batch, step_noise())[0])
    assert conditions.kinds().unique().numel() == len(set(zip(said, batch["label"].tolist(), strict=True)))


def test_the_encoder_reads_each_text_once_and_never_in_the_loop(names, clip, tmp_path, calls, cache):
    for file in cache.glob("*"):
        file.unlink()
    config = load_config("digits", settings_of(names, clip))
    first = train(config, tmp_path / "a", device="cpu", stages=["auxiliary", "flow", "sampler"])
    assert sorted(calls) == sorted({"", *NAMES})
    calls.clear()
    more = load_config("digits", settings_of(names, clip, "training.sampler.steps=8"))
    train(more, first, device="cpu", stages=["sampler"])
    assert not calls, "a run that goes on reads what was kept"
    (kept,) = cache.glob("*.safetensors")
    kept.write_bytes(b"damaged")
    train(config, tmp_path / "b", device="cpu", stages=["auxiliary"])
    assert not calls, "a stage that is told no text needs none"
    context_of(settings_of(names, clip))
    assert sorted(calls) == sorted({"", *NAMES}), "what is damaged is made again"


def test_a_run_goes_on_with_its_own_encoder_only(names, tmp_path, run):
    mine = write_clip(tmp_path / "encoder")
    config = load_config("digits", settings_of(names, mine))
    began = train(config, tmp_path / "run", device="cpu", stages=["auxiliary"])
    write_clip(mine, seed=1)
    with pytest.raises(UserError, match="was trained with another text encoder"):
        train(config, began, device="cpu", stages=["flow"])


def test_text_goes_as_often_as_it_should_and_whole(told):
    stage = build_stage("baseline", context_of(told))
    text = stage.context.texts[torch.zeros(4000, dtype=torch.long) + 3]
    given = stage.given(Conditions(label=torch.zeros(4000, dtype=torch.long), text=text), step_noise(4000))
    assert torch.equal(given["text"], text), "no words are left out of it"
    text_gone, label_gone = given.dropped["text"], given.dropped["label"]
    assert abs((text_gone & label_gone).float().mean() - 0.1) < 0.02
    assert abs((text_gone & ~label_gone).float().mean() - 0.9 * 0.2) < 0.03


# The network


@pytest.fixture(params=[False, True], ids=["pooled", "tokens"])
def network(request, run):
    text = load_run_config(run).text.model_copy(update={"tokens": request.param})
    return randomized(build_network(TABLE["sampler"], load_run_config(run).model_copy(update={"text": text})))


def velocity(network, conditions, t=0.3):
    x = torch.randn(2, *shape(network), generator=torch.Generator().manual_seed(0))
    return network(x, torch.full((2,), t), conditions)


def shape(network):
    size = network.config.sample_size
    return (network.config.in_channels, *((size, size) if isinstance(size, int) else size))


def rows(network, clip, *said):
    return TextEncoder.load(clip).encode(said, 6, tokens=network.config.conditions["text"]["tokens"])


def test_a_dropped_text_is_none_and_so_is_one_without_words(network, clip):
    text = Conditions(text=rows(network, clip, "cat", "a t"))
    plain = velocity(network, Conditions())
    torch.testing.assert_close(velocity(network, text.drop("text")), plain)
    torch.testing.assert_close(velocity(network, Conditions(text=rows(network, clip, "", "!"))), plain)
    half = velocity(network, text.drop("text", torch.tensor([True, False])))
    torch.testing.assert_close(half[0], plain[0])
    assert (half[1] - plain[1]).abs().max() > 1e-4


def test_tokens_are_attended_to_and_what_is_behind_the_end_is_not(run, clip):
    network = randomized(build_network(TABLE["sampler"], load_run_config(run)))
    text = rows(network, clip, "cat", "a")
    told = velocity(network, Conditions(text=text))
    other = text.clone()
    other[:, 1:] = rows(network, clip, "act", "t")[:, 1:]  # the same vector, other tokens
    assert (velocity(network, Conditions(text=other)) - told).abs().max() > 1e-4
    block = network.hourglass.middle[0].attention
    x = torch.randn(2, 2, 2, 16, generator=torch.Generator().manual_seed(0))
    words = network.embedders.words(Conditions(text=text))
    short = type(words)(words.tokens[:, :4], words.there[:, :4])
    assert words.there.sum(1).tolist() == [5, 3]
    torch.testing.assert_close(block(x, words)[1:], block(x, short)[1:])  # padding does not matter


def test_a_network_with_tokens_compiles_to_the_same(run, clip):
    network = randomized(build_network(TABLE["sampler"], load_run_config(run)))
    text = Conditions(text=rows(network, clip, "cat", "a"))
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    x, t = torch.randn(2, *shape(network)), torch.tensor([0.2, 0.7])
    torch.testing.assert_close(compiled(x, t, text), network(x, t, text))


# Sampling


def test_a_prompt_loads_the_encoder_and_changes_the_image(pipe, calls):
    assert pipe.reader is pipe.sampler and pipe._encoder is None
    plain = pipe(2, output_type="pt").images
    assert pipe._encoder is None, "without a prompt none is needed"
    images = {
        word: pipe(2, prompt=word, output_type="pt", latent_guidance=2.0).images for word in ("cat", "a t")
    }
    assert not torch.equal(images["cat"], images["a t"]) and not torch.equal(images["cat"], plain)
    calls.clear()
    pipe(4, prompt=["cat", "tact"], batch_size=1)
    assert calls == ["tact"], "each text is read once"


def test_an_image_depends_on_its_own_prompt_only(pipe):
    whole = pipe(4, prompt=["cat", "a c a t"], output_type="pt").images
    alone = pipe(1, prompt="a c a t", first_image=3, output_type="pt").images
    torch.testing.assert_close(alone, whole[3:], rtol=0, atol=1e-3)


def test_plain_flow_matching_takes_prompts_with_guidance(run):
    pipeline = quiet(load_pipeline(run / "baseline"))
    options = {"steps": 1, "solver": "euler", "output_type": "pt", "guidance": 3.0}
    one, two = (pipeline(1, prompt=text, **options) for text in ("cat", "a t"))
    assert not torch.equal(one.images, two.images) and one.nfe == {"flow": 2}


def test_a_long_prompt_is_cut_with_a_warning(pipe):
    with pytest.warns(UserWarning, match="a prompt is cut after 6 tokens"):
        pipe(1, prompt="cat tact cat")


def test_a_moved_pipeline_asks_for_its_encoder_and_takes_no_other(pipe, run, clip, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    loaded = quiet(load_pipeline(tmp_path / "saved"))
    asked = {"prompt": "cat", "output_type": "pt"}
    assert torch.equal(loaded(1, **asked).images, pipe(1, **asked).images)
    gone = {**pipe.config.prompt_encoder, "name": str(tmp_path / "gone")}
    loaded = quiet(load_pipeline(tmp_path / "saved"))
    loaded.register_to_config(prompt_encoder=gone)
    with pytest.raises(UserError, match="no text encoder .*load_text_encoder"):
        loaded(1, prompt="cat")
    with pytest.raises(UserError, match="is not the one that this model was trained with"):
        loaded.load_text_encoder(write_t5(tmp_path / "t5"))
    loaded.load_text_encoder(shutil.copytree(clip, tmp_path / "moved"))
    assert torch.equal(loaded(1, **asked).images, pipe(1, **asked).images)


def test_an_evaluation_asks_by_the_datas_texts(names, pipe):
    settled = pipe.settle(steps=1, latent_steps=1)
    request = Request(**settled, num_images=3, seed=3, batch_size=2, dtype="fp32", prompts=str(names))
    assert request.images(pipe, range(3)).images.shape[0] == 3


def test_the_command_takes_prompts_and_an_encoder(lediflow, run, clip, tiny_run, tmp_path):
    out = tmp_path / "made"
    done = lediflow("sample", run, "-n", 2, "--prompt", "a cat", "--text-encoder", clip, "--json", "-o", out)
    assert json.loads(done.stdout)["prompt"] == ["a cat"]
    again = lediflow("sample", "--again", out / "000001.png", "-o", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert Image.open(tmp_path / "again" / "000001.png").tobytes() == Image.open(out / "000001.png").tobytes()
    other = write_clip(tmp_path / "other", seed=1)
    refused(
        lediflow("sample", run, "--prompt", "cat", "--text-encoder", other, "-o", tmp_path / "x"),
        "is not the one that this model was trained with",
    )
    refused(lediflow("sample", tiny_run, "--text-encoder", clip, "-o", tmp_path / "x"), "reads no prompts")
    assert not (tmp_path / "x").exists()


def test_what_is_shared_names_the_encoder_without_its_folder(lediflow, run, clip, tmp_path):
    done = lediflow("push", run, "somebody/words", "--output", tmp_path / "shared", "--images", 2)
    assert done.returncode == 0, done.stderr
    for file in (tmp_path / "shared").rglob("*"):
        if file.suffix in (".json", ".md", ".yaml"):
            assert str(clip.parent) not in file.read_text(), file
    shared = quiet(load_pipeline(tmp_path / "shared"))
    assert shared.config.prompt_encoder["name"] == "tiny-clip"
    with pytest.raises(UserError, match="no text encoder 'tiny-clip'.*--text-encoder"):
        shared(1, prompt="cat")
    shared.load_text_encoder(clip)
    assert len(shared(1, prompt="cat").images) == 1


@pytest.mark.slow
def test_t5_trains_and_samples_too(names, tmp_path):
    t5 = write_t5(tmp_path / "t5")
    config = load_config("digits", settings_of(names, t5, "text.tokens=true", "text.networks=[sampler,flow]"))
    pipeline = quiet(load_pipeline(train(config, tmp_path / "run", device="cpu", stages=STAGES[:3])))
    one, two = (pipeline(1, prompt=text, guidance=3.0, output_type="pt").images for text in ("cat", "a t"))
    assert not torch.equal(one, two)


def test_the_apps_prompt_is_read_by_the_encoder_wherever_it_is_now(run, clip, pipe, app_limits, tmp_path):
    from lediflow.app import create
    from lediflow.app.models import Models
    from lediflow.app.session import Session

    moved, session = shutil.copytree(clip, tmp_path / "moved"), Session(tmp_path, 10)
    models = Models.load(str(run), text_encoder=str(moved), device="cpu")
    assert models.takes_text
    asked = {"seed": 4, "count": 2, "steps": 1, "prompt": "a cat"}
    *_, last = create.create(models, session, app_limits, asked)
    expected = pipe(2, seed=4, steps=1, prompt="a cat").images
    for kept, image in zip(last.done, expected, strict=True):
        assert Image.open(kept.path).convert("L").tobytes() == image.convert("L").tobytes()
    unasked = pipe(2, seed=4, steps=1).images
    assert expected[0].tobytes() != unasked[0].tobytes(), "words change the picture"
    assert create.restore(models, app_limits, last.done[0].path)[1]["prompt"] == "a cat"

    models.pipeline._encoder = None
    gone = {**pipe.config.prompt_encoder, "name": str(tmp_path / "gone")}
    models.pipeline.register_to_config(prompt_encoder=gone)
    with pytest.raises(UserError, match="no text encoder"):
        next(create.create(models, session, app_limits, {**asked, "seed": 5}))
