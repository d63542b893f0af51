"""Data sets of the Hub at a revision, by a Hub that is faked: none is reached."""

import json

import datasets
import pytest
from conftest import TINY
from huggingface_hub import HfApi
from test_strangers import stored

from lediflow.data.encode import encode
from lediflow.data.images import ImageData
from lediflow.data.streams import StreamData
from lediflow.errors import UserError
from lediflow.hub import split_revision
from lediflow.pipelines.load import load_pipeline
from lediflow.training.config import load_config
from lediflow.training.run import train

A, B = "a" * 40, "b" * 40


class Hub:
    """What is asked of it, and what it answers: the commit of each revision; None where nobody answers."""

    def __init__(self, table):
        self.table, self.commits, self.asked = table, {None: A, "v1": A, A: A, "main": A}, []

    def dataset_info(self, api, name, *, revision, timeout):
        if self.commits is None:
            raise OSError("no network")
        return type("Info", (), {"sha": self.commits[revision]})

    def split_names(self, name, config, **options):
        self.asked.append((name, config, options))
        return ["train", "validation"]

    def load(self, name, config, **options):
        self.asked.append((name, config, options))
        return self.table.to_iterable_dataset() if options["streaming"] else self.table


@pytest.fixture
def hub(monkeypatch, tmp_path):
    pictures = [{"bytes": stored(color=(20 * i, 0, 90)), "path": None} for i in range(12)]
    table = datasets.Dataset.from_dict(
        {"image": pictures}, features=datasets.Features({"image": datasets.Image()})
    )
    table.save_to_disk(tmp_path / A)  # a copy lies in a folder of the commit's name, as in datasets' cache
    hub = Hub(datasets.load_from_disk(tmp_path / A))
    monkeypatch.setattr(HfApi, "dataset_info", lambda *a, **options: hub.dataset_info(*a, **options))
    monkeypatch.setattr(datasets, "load_dataset", hub.load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", hub.split_names)
    monkeypatch.chdir(tmp_path)
    return hub


@pytest.mark.parametrize("opened", [ImageData, StreamData])
def test_all_is_read_at_the_commit_that_the_revision_is(hub, opened):
    data = opened("owner/set:big@v1", image_size=8)
    assert data.commit == A
    for name, config, options in hub.asked:
        assert (name, config, options["revision"]) == ("owner/set", "big", A)
        assert "trust_remote_code" not in options
    assert opened("owner/set", image_size=8).commit == A
    assert hub.asked[-1][1:] == (None, {"split": "train", "streaming": opened is StreamData, "revision": A})


def test_without_the_hub_a_copy_of_another_commit_is_not_taken_for_the_one_asked_for(hub):
    hub.commits = None
    assert ImageData(f"owner/set@{A}", image_size=8).commit == A, "the copy's"
    assert ImageData("owner/set", image_size=8).commit == A
    for revision in ("v1", B):
        with pytest.raises(UserError, match=f"what revision {revision} of owner/set is, .* of commit {A}"):
            ImageData(f"owner/set@{revision}", image_size=8)
    with pytest.raises(UserError, match="unknown one"):
        StreamData(f"owner/set@{A}", image_size=8)


def test_a_folder_may_have_an_at_sign(tmp_path):
    (tmp_path / "owner@home").mkdir()
    assert split_revision(str(tmp_path / "owner@home")) == (str(tmp_path / "owner@home"), None)
    assert split_revision("owner/name@refs/pr/1") == ("owner/name", "refs/pr/1")


def test_a_run_keeps_the_commit_and_resumes_with_it(hub, tmp_path, capsys):
    def begin(steps, **options):
        settings = ["data.image_size=16", "data.channels=3", f"training.auxiliary.steps={steps}"]
        config = load_config("digits", [*TINY, *settings], values={"data.train": "owner/set"})
        return train(config, tmp_path / "run", stages=["auxiliary"], device="cpu", **options)

    run = begin(2)
    assert json.loads((run / "dataset.json").read_text()) == {"train": "owner/set", "commit": A}
    assert f"`owner/set` (commit `{A}`)" in (run / "README.md").read_text()
    assert f"12 images of 16 px from owner/set (commit {A[:12]})" in capsys.readouterr().err
    hub.commits = {None: B, A: A, B: B}
    begin(3)
    assert hub.asked[-1][2]["revision"] == A, "the Hub has moved on, the run has not"
    begin(3, resume=False)
    assert json.loads((run / "dataset.json").read_text())["commit"] == B


def test_latents_of_two_commits_are_not_mixed(hub, tiny_codec, tmp_path):
    from lediflow.codecs import Codec

    def begin(dataset):
        return encode(dataset, Codec.load(tiny_codec), tmp_path / "latents", image_size=16, shard_size=6)

    meta = begin("owner/set")
    assert (meta["dataset"], meta["commit"]) == ("owner/set", A)
    next((tmp_path / "latents").glob("*.parquet")).unlink()
    hub.commits = {None: B, A: A}
    with pytest.raises(UserError, match=f"commit: {A} there, {B} now"):
        begin("owner/set")
    assert begin(f"owner/set@{A}") == meta


def test_a_model_that_the_hub_does_not_give_is_named_at_once(monkeypatch):
    asked = []

    def refuse(url, **options):
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refuse)
    with pytest.raises(UserError, match=r"owner/name@v1 is no folder and .* does not give it \(OSError\)"):
        load_pipeline("owner/name@v1")
    assert [url.partition("/owner/")[2] for url in asked] == ["name/resolve/v1/model_index.json"]
