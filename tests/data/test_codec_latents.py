"""Encoding to a latents folder and reading it: shards, restarts, processes, statistics, batches."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lediflow.codecs import Codec
from lediflow.data.batches import batches
from lediflow.data.codec_latents import CodecLatents, is_codec_latents
from lediflow.data.encode import encode
from lediflow.data.images import ImageData
from lediflow.data.listing import open_dataset
from lediflow.errors import UserError

OPTIONS = {"image_size": 16, "split": "validation", "shard_size": 100, "batch_size": 50}


@pytest.fixture(scope="module")
def codec(tiny_codec):
    return Codec.load(tiny_codec)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    datasets.disable_progress_bars()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_stored_is_what_the_codec_gives(codec, tiny_codec, tiny_latents):
    images = ImageData("digits", image_size=16, split="validation")
    data = CodecLatents(str(tiny_latents), flip=True)
    assert len(data) == 297 and data.shape == (4, 8, 8)
    assert torch.equal(data.labels, images.labels) and data.class_names == images.class_names
    index = torch.tensor([0, 150, 296])
    pictures = images.images[index].float() / 127.5 - 1
    for flipped in (False, True):
        stored = data._encoded(index, torch.full((3,), flipped))
        wanted = codec.encode(pictures.flip(-1) if flipped else pictures)
        torch.testing.assert_close(stored.mean, wanted.mean, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(stored.log_var, wanted.log_var, rtol=2e-3, atol=2e-3)
    meta = json.loads((tiny_latents / "latents.json").read_text())
    assert meta["codec"] == str(tiny_codec) and meta["hash"] == codec.hash
    assert (meta["factor"], meta["channels"], meta["image_size"]) == (2, 4, 16)
    assert (meta["count"], meta["shards"], meta["dtype"], meta["sample"]) == (297, 3, "fp16", "posterior")
    assert meta["broken"] == [] and meta["class_names"] == [str(n) for n in range(10)]


def test_served_latents_have_mean_0_and_variance_1(tiny_latents):
    data = CodecLatents(str(tiny_latents), flip=True)
    index = torch.arange(297)
    both = [data._encoded(index, torch.full((297,), flipped)) for flipped in (False, True)]
    mean = torch.cat([data.space.normalize(encoded.mean) for encoded in both])
    std = torch.cat([encoded.std for encoded in both]) / torch.tensor(data.space.std).view(-1, 1, 1)
    assert mean.mean((0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close((mean.square() + std.square()).mean((0, 2, 3)), torch.ones(4))
    drawn = torch.cat([batch["image"] for batch in batches(data, batch_size=99, seed=0, stop=6)])
    assert drawn.mean((0, 2, 3)).abs().max() < 0.05
    assert (drawn.std((0, 2, 3)) - 1).abs().max() < 0.05


def test_any_number_of_processes_writes_the_same_bytes(codec, tiny_latents, tmp_path):
    assert encode("digits", codec, tmp_path, **OPTIONS, rank=1, world_size=2) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents-00001-of-00003.parquet"]
    assert is_codec_latents(str(tmp_path))
    with pytest.raises(UserError, match="unfinished; give the same `lediflow encode` command again"):
        CodecLatents(str(tmp_path))
    assert encode("digits", codec, tmp_path, **OPTIONS, rank=0, world_size=2)["count"] == 297
    assert contents(tmp_path) == contents(tiny_latents)


def test_a_stopped_encoding_goes_on_where_it_was(codec, tiny_latents, tmp_path):
    folder = shutil.copytree(tiny_latents, tmp_path / "latents")
    names = sorted(path.name for path in folder.glob("*.parquet"))
    (folder / "latents.json").unlink()
    (folder / names[0]).unlink()
    (folder / names[1]).write_bytes((folder / names[1]).read_bytes()[:-100])  # a full disk, a lost node
    for name in ("latents-00001-of-00003-{}.parquet", "latents-{}.json"):  # a killed process
        (folder / f".{name.format('0' * 32)}").write_bytes(b"half")
    before = (folder / names[2]).stat().st_mtime_ns
    seen = []
    encode("digits", codec, folder, **OPTIONS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(50, 200), (100, 200), (150, 200), (200, 200)]
    assert (folder / names[2]).stat().st_mtime_ns == before
    assert contents(folder) == contents(tiny_latents)


def test_another_encoding_in_the_folder_is_refused_by_name(codec, tiny_latents):
    with pytest.raises(UserError, match=r"\(dtype: fp16 there, bf16 now\); choose another --output"):
        encode("digits", codec, tiny_latents, **OPTIONS, dtype="bf16")
    with pytest.raises(UserError, match="image_size: 16 there, 32 now"):
        encode("digits", codec, tiny_latents, **{**OPTIONS, "image_size": 32})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 15}, "no multiple of the codec's factor 2"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8'.*fp16, bf16"),
        ({"sample": "mean"}, "unknown sample 'mean'.*mode"),
        ({"shard_size": 0}, "shard size 0"),
    ],
)
def test_impossible_encodings(codec, tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        encode("digits", codec, tmp_path, **{**OPTIONS, **wrong})


def test_bf16_and_mode(codec, tiny_latents, tmp_path):
    encode("digits", codec, tmp_path, **OPTIONS, dtype="bf16", sample="mode")
    data, fine = CodecLatents(str(tmp_path)), CodecLatents(str(tiny_latents))
    assert data.cached and not fine.cached
    coarse, exact = (d.space.denormalize(d.first(8)) for d in (data, fine))
    torch.testing.assert_close(coarse, exact, rtol=2**-7, atol=1e-3)
    assert not torch.equal(coarse, exact)
    batch = next(batches(data, batch_size=8, seed=0, stop=1))
    whole = torch.cat(list(data.in_order(100)))
    assert torch.equal(batch["image"], whole[batch["index"]])
    with pytest.raises(UserError, match="flip=False"):
        next(data.in_order(8, mirror=True))


def test_too_wide_a_range_for_fp16_is_refused(codec, tmp_path):
    wide = Codec(Codec.load(codec.name).model)
    wide.scale = 1e7
    with pytest.raises(UserError, match="beyond the range of fp16.*--dtype bf16"):
        encode("digits", wide, tmp_path, **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_draws_depend_on_the_place_alone_and_have_the_posterior_s_spread(tiny_latents):
    data = CodecLatents(str(tiny_latents))
    draws = torch.cat([data.batch([(5, key)])["image"] for key in range(400)])
    posterior = data._encoded(torch.tensor([5]), torch.tensor([False]))
    std = posterior.std[0] / torch.tensor(data.space.std).view(-1, 1, 1)
    torch.testing.assert_close(draws.std(0), std, rtol=0.25, atol=0)
    assert (draws.mean(0) - data.space.normalize(posterior.mean[0])).abs().max() < 0.3 * std.max()
    assert torch.equal(data.batch([(5, 7)])["image"], data.batch([(1, 3), (5, 7)])["image"][1:])


def test_memory_disk_workers_ranks_and_resumption_give_the_same_batches(tiny_latents):
    held = CodecLatents(str(tiny_latents), flip=True)
    mapped = CodecLatents(str(tiny_latents), flip=True, cache_gb=0)
    options = {"batch_size": 8, "seed": 4, "stop": 6}
    whole = list(batches(held, **options))
    halves = [list(batches(held, **options, rank=rank, world_size=2)) for rank in (0, 1)]
    runs = [
        list(batches(mapped, **options)),
        list(batches(mapped, **options, workers=2)),
        list(batches(held, **options, workers=1)),
        [{name: torch.cat([a[name], b[name]]) for name in a} for a, b in zip(*halves, strict=True)],
        whole[:3] + list(batches(held, **options, start=3)),
    ]
    assert 0 < sum(batch["flipped"].sum() for batch in whole) < 48
    for run in runs:
        assert len(run) == 6
        for a, b in zip(whole, run, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
    assert (
        torch.equal(held.first(5), mapped.first(5))
        and held.first_labels(5).tolist() == held.labels[:5].tolist()
    )


def test_broken_images_are_left_out_and_named(codec, tmp_path):
    (tmp_path / "set").mkdir()
    for n in range(6):
        file = io.BytesIO()
        Image.fromarray(np.full((16, 16, 3), 40 * n, dtype=np.uint8)).save(file, "PNG")
        (tmp_path / "set" / f"{n}.png").write_bytes(file.getvalue() if n != 3 else b"no picture")
    with pytest.warns(UserWarning, match=r"3\.png"):
        meta = encode(str(tmp_path / "set"), codec, tmp_path / "out", image_size=16, shard_size=2)
    assert meta["count"] == 5 and meta["broken"][0][0].endswith("3.png")
    assert len(CodecLatents(str(tmp_path / "out"))) == 5
    with pytest.raises(UserError, match="holds a codec's latents, no images"):
        open_dataset(str(tmp_path / "out"))


def test_missing_and_damaged_shards_are_named_with_the_way_out(tiny_latents, tmp_path):
    folder = shutil.copytree(tiny_latents, tmp_path / "latents")
    shard = folder / "latents-00001-of-00003.parquet"
    shard.write_bytes(shard.read_bytes()[:-200])
    for cache_gb in (0, 1):
        with pytest.raises(UserError, match="damaged .*`lediflow encode` command again"):
            CodecLatents(str(folder), cache_gb=cache_gb)
    shard.unlink()
    with pytest.raises(UserError, match="2 of 3 shards"):
        CodecLatents(str(folder))


def test_showing_decodes_if_the_codec_is_there_else_three_channels(codec, tiny_codec, tiny_latents, tmp_path):
    data = CodecLatents(str(tiny_latents))
    items = data.first(3)
    torch.testing.assert_close(data.show(items), codec.decode(data.space.denormalize(items)))
    moved = shutil.copytree(tiny_latents, tmp_path / "latents")
    meta = json.loads((moved / "latents.json").read_text())
    (moved / "latents.json").write_text(json.dumps({**meta, "codec": str(tmp_path / "gone")}))
    shown = CodecLatents(str(moved)).show(items)
    assert shown.shape == (3, 3, 8, 8) and shown.abs().max() <= 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("std", [1.0] * 3),
        ("std", [0.0] * 4),
        ("mean", None),
        ("mean", [float("nan")] * 4),
        ("image_size", "16"),
        ("image_size", 15),
        ("factor", 0),
        ("channels", 2),
        ("dtype", "fp8"),
        ("sample", []),
        ("class_names", 3),
        ("count", -1),
        ("shards", None),
        ("codec", {}),
    ],
)
def test_a_changed_latents_json_is_refused_by_key(tiny_latents, tmp_path, key, value):
    folder = shutil.copytree(tiny_latents, tmp_path / "latents")
    meta = json.loads((folder / "latents.json").read_text())
    (folder / "latents.json").write_text(json.dumps({**meta, key: value}))
    with pytest.raises(UserError, match=rf"damaged .*{key}" if key != "channels" else "damaged"):
        CodecLatents(str(folder))
    del meta[key]
    (folder / "latents.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=f"damaged .*{key}"):
        CodecLatents(str(folder))


@pytest.mark.parametrize("data", [b"", b"\x9b", b"[1]", b"null", b'{"a": '])
def test_a_latents_json_that_is_none(tiny_latents, tmp_path, data):
    folder = shutil.copytree(tiny_latents, tmp_path / "latents")
    (folder / "latents.json").write_bytes(data)
    with pytest.raises(UserError, match=r"latents\.json"):
        CodecLatents(str(folder))


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_shards_with_other_cells_are_damaged(tiny_latents, tmp_path, cache_gb):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for n, (name, cell) in enumerate((("mean", None), ("mean", b"short"), ("label", None), ("label", "x"))):
        folder = shutil.copytree(tiny_latents, tmp_path / f"{cache_gb}{n}")
        for shard in folder.glob("*.parquet"):
            table = pq.read_table(shard)
            place = table.column_names.index(name)
            pq.write_table(table.set_column(place, name, pa.array([cell] * len(table))), shard)
        with pytest.raises(UserError, match="damaged"):
            data = CodecLatents(str(folder), cache_gb=cache_gb)
            next(batches(data, batch_size=8, seed=0, stop=1))
