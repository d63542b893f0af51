"""Tar shards, URLs, Hub ids, and streams of them."""

from __future__ import annotations

import io
import json
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lediflow.data.batches import batches
from lediflow.data.images import ImageData
from lediflow.data.listing import open_dataset
from lediflow.data.streams import StreamData
from lediflow.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    datasets.disable_progress_bars()


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, data in samples:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path):
    """Four tar shards of ten pictures; picture n is of level n and class n % 2."""
    for shard in range(4):
        samples = []
        for n in range(10 * shard, 10 * shard + 10):
            samples += [(f"{n:04d}.png", png(n)), (f"{n:04d}.cls", str(n % 2).encode())]
        write_tar(tmp_path / f"{shard:03d}.tar", samples)
    return tmp_path


def levels(batch) -> list[int]:
    return [round(x) for x in ((batch["image"][:, 0, 0, 0] + 1) * 127.5).tolist()]


def stream(shards, **options):
    return StreamData(
        str(shards / "{000..003}.tar"), **{"image_size": 8, "shuffle_block": 4, "flip": True, **options}
    )


# Listing


@pytest.mark.parametrize("name", ["{000..003}.tar", "*.tar", ""])
def test_tar_shards_are_addressed_like_any_set(shards, name):
    data = ImageData(str(shards / name) if name else str(shards), image_size=8)
    assert data.images[:, 0, 0, 0].tolist() == list(range(40))
    assert data.labels.tolist() == [0, 1] * 20 and data.num_classes == 2


def test_ranges_keep_their_zeros_and_a_missing_shard_is_named(shards):
    assert len(open_dataset(str(shards / "{001..002}.tar"))) == 20
    with pytest.raises(UserError, match="cannot read any row of .*003"):
        open_dataset(str(shards / "{003..004}.tar"))


def test_urls_are_read_through_datasets(shards):
    rows = open_dataset(f"file://{shards}/{{000..001}}.tar", streaming=True)
    assert [row["label"] for row in rows] == [0, 1] * 10


def test_a_tar_that_is_none(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"not a tar at all" * 100)
    for streaming in (False, True):
        with pytest.raises(UserError, match="cannot read any row"):
            open_dataset(str(tmp_path / "x.tar"), streaming=streaming)
    write_tar(tmp_path / "text.tar", [("0.txt", b"words"), ("1.txt", b"more")])
    with pytest.raises(UserError, match="no image column .* txt"):
        open_dataset(str(tmp_path / "text.tar"))


def test_hub_ids_are_asked_for_with_config_and_split(shards, monkeypatch):
    import datasets

    real, asked = datasets.load_dataset, []

    def load(name, config, *, split, streaming, revision):
        asked.append((name, config, split, streaming))
        return real("webdataset", data_files=str(shards / "000.tar"), split="train", streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config, **_: ["train", "test"])
    assert len(ImageData("owner/some-set:small", image_size=8)) == 10
    assert len(open_dataset("owner/some-set", "validation")) == 10
    assert next(iter(open_dataset("owner/some-set", streaming=True)))["label"] == 0
    assert asked == [
        ("owner/some-set", "small", "train", False),
        ("owner/some-set", None, "test", False),
        ("owner/some-set", None, "train", True),
    ]
    with pytest.raises(UserError, match="no split 'extra'; it has train, test"):
        open_dataset("owner/some-set", "extra")


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    with pytest.raises(UserError, match=r"no folder 'owner/set' here, and .*Couldn't reach the Hub$"):
        open_dataset("owner/set")


# Streams


def test_an_epoch_serves_every_picture_once_and_shuffled(shards):
    data = stream(shards)
    served = [n for batch in batches(data, batch_size=8, seed=0, stop=10) for n in levels(batch)]
    assert sorted(served[:40]) == sorted(served[40:]) == list(range(40))
    assert served[:40] != served[40:] and served[:40] != sorted(served[:40])
    again = [n for batch in batches(data, batch_size=8, seed=0, stop=10) for n in levels(batch)]
    other = [n for batch in batches(data, batch_size=8, seed=1, stop=10) for n in levels(batch)]
    assert served == again and served != other
    batch = next(batches(data, batch_size=40, seed=0, stop=1))
    assert batch["label"].tolist() == [n % 2 for n in levels(batch)]
    assert 5 < batch["flipped"].sum() < 35


def test_ranks_share_an_epoch(shards):
    parts = [
        list(batches(stream(shards), batch_size=8, seed=0, stop=5, rank=r, world_size=2)) for r in (0, 1)
    ]
    assert all(len(batch["image"]) == 4 for part in parts for batch in part)
    assert sorted(n for part in parts for batch in part for n in levels(batch)) == list(range(40))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_exactly_from_its_position_or_from_its_step(shards, workers):
    options = {"batch_size": 6, "seed": 3, "stop": 16, "workers": workers}
    whole = list(batches(stream(shards), **options))
    for start in (5, 8):
        position = json.loads(json.dumps(whole[start - 1]["position"]))  # it survives a checkpoint's JSON
        for resumed in (
            list(batches(stream(shards), **options, start=start, position=position)),
            list(batches(stream(shards), **options, start=start)),
        ):
            assert len(resumed) == 16 - start
            for a, b in zip(whole[start:], resumed, strict=True):
                assert torch.equal(a["image"], b["image"]) and torch.equal(a["flipped"], b["flipped"])
                assert a["position"] == b["position"]


def test_parquet_files_stream_and_go_on_too(tmp_path):
    import datasets

    for shard in range(2):
        rows = [{"bytes": png(n), "path": f"{n}.png"} for n in range(10 * shard, 10 * shard + 10)]
        datasets.Dataset.from_dict({"image": rows}).to_parquet(tmp_path / f"{shard}.parquet")
    data = StreamData(str(tmp_path), image_size=8, shuffle_block=7)
    whole = list(batches(data, batch_size=4, seed=0, stop=12))
    assert sorted(n for batch in whole[:5] for n in levels(batch)) == list(range(20))
    rest = list(batches(data, batch_size=4, seed=0, start=7, stop=12, position=whole[6]["position"]))
    assert [levels(batch) for batch in rest] == [levels(batch) for batch in whole[7:]]


def test_a_folder_can_be_streamed(shards, tmp_path):
    (tmp_path / "pictures").mkdir()
    for n in range(12):
        (tmp_path / "pictures" / f"{n:02d}.png").write_bytes(png(n))
    data = StreamData(str(tmp_path / "pictures"), image_size=8)
    assert sorted(levels(next(batches(data, batch_size=12, seed=0, stop=1)))) == list(range(12))


def test_another_number_of_workers_starts_a_new_epoch(shards):
    first = list(batches(stream(shards), batch_size=10, seed=0, stop=2))
    with pytest.warns(UserWarning, match="left by 1 processes with 1 workers and resumes with 1 and 2"):
        rest = list(
            batches(
                stream(shards),
                batch_size=10,
                seed=0,
                start=2,
                stop=6,
                workers=2,
                position=first[-1]["position"],
            )
        )
    assert sorted(n for batch in rest for n in levels(batch)) == list(range(40))


def test_no_more_workers_than_shards(shards):
    data = StreamData(str(shards / "000.tar"), image_size=8)
    assert len(list(batches(data, batch_size=5, seed=0, stop=3, workers=4))) == 3


def test_broken_pictures_are_passed_over_counted_and_named(shards):
    write_tar(
        shards / "004.tar", [("0.png", b"no picture"), ("0.cls", b"0"), ("1.png", png(200)), ("1.cls", b"0")]
    )
    data = StreamData(str(shards / "{000..004}.tar"), image_size=8, shuffle_block=4)
    with pytest.warns(UserWarning, match=r"0\.png \(not a picture\)"):
        served = [n for batch in batches(data, batch_size=41, seed=0, stop=1) for n in levels(batch)]
    assert sorted(served) == [*range(40), 200]
    assert [image.name for image in data.broken] == ["0.png"] and data.seen == 42


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_pictures_end_a_stream(tmp_path, workers):
    samples = [(f"{n:03d}.png", png(n) if n % 4 == 0 else b"no picture") for n in range(200)]
    write_tar(tmp_path / "bad.tar", samples)
    data = StreamData(str(tmp_path / "bad.tar"), image_size=8, max_broken=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=r"images in .* cannot be read: .*not a picture.*mend") as caught:
            list(batches(data, batch_size=10, seed=0, stop=20, workers=workers))
        assert "Traceback" not in str(caught.value)
        write_tar(tmp_path / "worse.tar", [(f"{n}.png", b"no picture") for n in range(5)])
        hopeless = StreamData(str(tmp_path / "worse.tar"), image_size=8, max_broken=1.0)
        with pytest.raises(UserError, match="no image in .* can be read"):
            list(batches(hopeless, batch_size=2, seed=0, stop=1, workers=workers))


def test_a_shard_cut_short_is_an_error_that_names_the_set(shards):
    path = shards / "002.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot read .*tar"):
        list(batches(stream(shards), batch_size=8, seed=0, stop=5))


def test_the_head_and_a_pass_in_order(shards):
    data = stream(shards)
    assert data.first(3).shape == (3, 3, 8, 8) and torch.equal(data.first(3), data.first(8)[:3])
    assert data.first_labels(8).tolist() == [n % 2 for n in levels({"image": data.first(8)})]
    plain, mirrored = (torch.cat(list(data.in_order(7, mirror=m))) for m in (False, True))
    assert sorted(levels({"image": plain})) == list(range(40))
    assert torch.equal(plain, mirrored.flip(-1))


def test_labels_in_words_cannot_be_streamed(tmp_path):
    import datasets

    rows = {"image": [{"bytes": png(0), "path": None}], "label": ["zebra"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"are text.*data\.streaming=false"):
        StreamData(str(tmp_path), image_size=8)


def test_numbered_classes_are_those_that_are_said_to_be_there(shards):
    assert stream(shards).num_classes == 0 and stream(shards, classes=2).class_names == ["0", "1"]
    data = stream(shards, classes=1)
    with pytest.warns(UserWarning, match="its label is 1, and there are 1 classes"):
        batch = next(batches(data, batch_size=20, seed=0, stop=1))
    assert sorted(levels(batch)) == list(range(0, 40, 2))
    assert StreamData("digits", image_size=8).num_classes == 10


# Ranks of a set with an index


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_serve_the_batch_of_one(shards, world_size):
    data = ImageData(str(shards), image_size=8, flip=True)
    options = {"batch_size": 8, "seed": 5, "stop": 4}
    whole = list(batches(data, **options))
    parts = [list(batches(data, **options, rank=r, world_size=world_size)) for r in range(world_size)]
    for step, batch in enumerate(whole):
        for name in batch:
            assert torch.equal(batch[name], torch.cat([part[step][name] for part in parts]))


def test_batches_that_cannot_be_shared(shards):
    data = ImageData(str(shards), image_size=8)
    for wrong in ({"batch_size": 0}, {"start": -1}, {"world_size": 3}, {"world_size": 2, "rank": 2}):
        with pytest.raises(UserError, match="batch"):
            batches(data, **{"batch_size": 8, "seed": 0, "stop": 1, **wrong})
