"""Finding, decoding and serving pictures."""

from __future__ import annotations

import io
import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lediflow.data.images import (
    BrokenImageError,
    ImageData,
    StepSampler,
    batches,
    decode,
    open_dataset,
    to_float,
    to_uint8,
)
from lediflow.errors import UserError

SHARED = Path(os.environ.get("LEDIFLOW_SHARED") or Path(__file__).resolve().parents[3] / "shared")
FACES = SHARED / "data" / "faces64-validation.parquet"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    datasets.disable_progress_bars()


def file_bytes(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def read(data: bytes, size: int = 8, channels=3, **options) -> np.ndarray:
    return decode({"bytes": data, "path": None}, image_size=size, channels=channels, **options)


def noise(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write(path: Path, picture: Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)
    return path


def folder_of_noise(root: Path, count: int, width: int = 16, height: int = 16) -> Path:
    for i in range(count):
        write(root / "ab"[i % 2] / f"{i:03d}.png", noise(i, width, height))
    return root


def truncated(path: Path) -> Path:
    data = file_bytes(noise(0, 64, 64), "JPEG", quality=95)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data[: len(data) // 2])
    return path


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


# Folders


def test_subfolders_are_classes_in_sorted_order(tmp_path):
    for name in ("dog/2.png", "cat/deep/er/1.png", "cat/0.JPG", "dog/.hidden.png", ".git/x.png", "dog/a.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".txt"):
            path.write_text("a note")
        else:
            noise(1).save(path)
    rows = open_dataset(str(tmp_path))
    found = [Path(row["image"]["path"]).relative_to(tmp_path).as_posix() for row in rows]
    assert found == ["cat/0.JPG", "cat/deep/er/1.png", "dog/2.png"]
    assert rows["label"][:] == [0, 0, 1]
    assert rows.features["label"].names == ["cat", "dog"]
    data = ImageData(str(tmp_path), image_size=16)
    assert (data.num_classes, data.class_names) == (2, ["cat", "dog"])
    assert data.labels.tolist() == [0, 0, 1]
    assert torch.equal(data.images[2], torch.from_numpy(np.array(noise(1))).permute(2, 0, 1))


@pytest.mark.parametrize("names", [("a.png", "b.png"), ("a.png", "sub/b.png")])
def test_pictures_in_the_root_mean_no_classes(tmp_path, names):
    for name in names:
        write(tmp_path / name, noise(0))
    data = ImageData(str(tmp_path), image_size=16)
    assert "label" not in open_dataset(str(tmp_path)).column_names
    assert (len(data), data.num_classes, data.class_names) == (2, 0, [])
    assert data[1]["label"] == 0


def test_split_folders(tmp_path):
    write(tmp_path / "train/x/0.png", noise(0))
    write(tmp_path / "train/y/1.png", noise(1))
    write(tmp_path / "val/y/2.png", noise(2))
    train, held_out = open_dataset(str(tmp_path)), open_dataset(str(tmp_path), "validation")
    assert (len(train), train.features["label"].names) == (2, ["x", "y"])
    assert [Path(row["image"]["path"]).name for row in held_out] == ["2.png"]


def test_train_beside_other_classes_is_a_class(tmp_path):
    for name in ("bus", "train"):
        write(tmp_path / name / "0.png", noise(0))
    assert open_dataset(str(tmp_path)).features["label"].names == ["bus", "train"]


def test_a_linked_class_folder_is_read_and_a_loop_ends(tmp_path):
    write(tmp_path / "far/0.png", noise(0))
    write(tmp_path / "set/near/1.png", noise(1))
    try:
        (tmp_path / "set/linked").symlink_to(tmp_path / "far", target_is_directory=True)
        (tmp_path / "set/near/up").symlink_to(tmp_path / "set", target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no symbolic links")
    rows = open_dataset(str(tmp_path / "set"))
    assert rows.features["label"].names == ["linked", "near"] and len(rows) == 2


def test_no_validation_split_says_how_to_give_one(tmp_path):
    write(tmp_path / "flat/a/0.png", noise(0))
    with pytest.raises(UserError, match="subfolders 'train' and 'validation'"):
        open_dataset(str(tmp_path / "flat"), "validation")
    write(tmp_path / "only/train/0.png", noise(0))
    with pytest.raises(UserError, match="make a subfolder 'validation'"):
        open_dataset(str(tmp_path / "only"), "validation")
    assert len(open_dataset(str(tmp_path / "only"))) == 1


def test_missing_empty_and_foreign_folders(tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        open_dataset(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        open_dataset(str(tmp_path / "empty"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/notes.txt").write_text("words")
    with pytest.raises(UserError, match=r"no images .*notes\.txt"):
        open_dataset(str(tmp_path / "texts"))
    with pytest.raises(UserError, match="no Parquet or Arrow file"):
        open_dataset(str(tmp_path / "texts/notes.txt"))


# Parquet and Arrow


def table(count: int, **columns) -> object:
    import datasets

    return datasets.Dataset.from_dict(
        {"img": [{"bytes": file_bytes(noise(i)), "path": None} for i in range(count)], **columns}
    )


def test_parquet_round_trip(tmp_path):
    path = tmp_path / "odd [name].parquet"
    table(3, class_=[0, 1, 1]).rename_column("class_", "class").to_parquet(path)
    rows = open_dataset(str(path))
    assert rows.column_names == ["image", "label"]
    data = ImageData(str(path), image_size=16)
    assert data.labels.tolist() == [0, 1, 1] and data.class_names == ["0", "1"]
    for i in range(3):
        assert torch.equal(data.images[i], torch.from_numpy(np.array(noise(i))).permute(2, 0, 1))


def test_parquet_with_the_image_feature_prefers_the_column_named_image(tmp_path):
    import datasets

    features = datasets.Features(
        {"mask": datasets.Image(), "image": datasets.Image(), "label": datasets.Value("string")}
    )
    rows = {"mask": [Image.new("RGB", (16, 16))], "image": [noise(5)], "label": ["zebra"]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    data = ImageData(str(tmp_path / "a.parquet"), image_size=16)
    assert data.class_names == ["zebra"]
    assert torch.equal(data.images[0], torch.from_numpy(np.array(noise(5))).permute(2, 0, 1))


def test_parquet_splits_by_file_name(tmp_path):
    table(3).to_parquet(tmp_path / "set-train-00000.parquet")
    table(2).to_parquet(tmp_path / "set-train-00001.parquet")
    table(1).to_parquet(tmp_path / "set-validation.parquet")
    table(4).to_parquet(tmp_path / "latest.parquet")
    for name in (str(tmp_path), str(tmp_path / "*.parquet")):
        assert len(open_dataset(name)) == 5
        assert len(open_dataset(name, "validation")) == 1
    assert len(open_dataset(str(tmp_path / "set-validation.parquet"))) == 1
    with pytest.raises(UserError, match="no split 'validation'"):
        open_dataset(str(tmp_path / "latest.parquet"), "validation")


def test_arrow_folder_of_datasets_own(tmp_path):
    table(3, label=[2, 0, 1]).save_to_disk(tmp_path / "saved")
    assert ImageData(str(tmp_path / "saved"), image_size=16).labels.tolist() == [2, 0, 1]


def test_bad_tables(tmp_path):
    import datasets

    with pytest.raises(UserError, match="no file or folder"):
        open_dataset(str(tmp_path / "none.parquet"))
    with pytest.raises(UserError, match="no Parquet"):
        open_dataset(str(tmp_path / "none-*.parquet"))
    datasets.Dataset.from_dict({"text": ["a"], "n": [1]}).to_parquet(tmp_path / "text.parquet")
    with pytest.raises(UserError, match=r"no image column .* text, n"):
        open_dataset(str(tmp_path / "text.parquet"))
    table(1).select([]).to_parquet(tmp_path / "no-rows.parquet")
    with pytest.raises(UserError, match="cannot read any row"):
        ImageData(str(tmp_path / "no-rows.parquet"), image_size=16)
    (tmp_path / "junk.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match="cannot read"):
        open_dataset(str(tmp_path / "junk.parquet"))
    table(2, label=[0, -1]).to_parquet(tmp_path / "negative.parquet")
    with pytest.raises(UserError, match="labels"):
        ImageData(str(tmp_path / "negative.parquet"), image_size=16)


# Decoding


def test_exif_orientation_is_applied():
    picture = Image.new("RGB", (32, 32), "black")
    picture.paste("white", (0, 0, 32, 16))  # stored: bright on top
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise: bright at the right
    pixels = read(file_bytes(picture, "JPEG", quality=95, exif=exif.tobytes()), 32)
    assert pixels[:, :, 20:].mean() > 250 and pixels[:, :, :12].mean() < 5


def test_transparent_pixels_turn_white():
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    half.paste((0, 0, 0, 0), (4, 0, 8, 8))
    pixels = read(file_bytes(half))
    assert pixels[:, 0, 0].tolist() == [255, 0, 0] and pixels[:, 0, 7].tolist() == [255, 255, 255]
    faint = read(file_bytes(Image.new("LA", (8, 8), (0, 51))), channels=1)
    assert faint.shape == (1, 8, 8) and np.all(faint == 204)


def test_palette_with_and_without_transparency():
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    assert read(file_bytes(picture))[:, 3, 3].tolist() == [10, 200, 30]
    assert read(file_bytes(picture, transparency=1))[:, 3, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_cmyk(channels):
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixels = read(file_bytes(red, "JPEG", quality=95), channels=channels)[:, 4, 4].astype(int)
    wanted = [255, 0, 0] if channels == 3 else [76]
    assert np.abs(pixels - wanted).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_range(kind):
    levels = np.repeat(np.array([[0, 257 * 40, 257 * 128, 65535]], dtype=np.uint16), 4, axis=0)
    pixels = read(file_bytes(Image.fromarray(levels), kind), 4, channels=1)
    assert pixels[0, 0].tolist() == [0, 40, 128, 255]


def test_32_bit_and_float_grey():
    whole = Image.fromarray(np.full((4, 4), 257 * 100, dtype=np.int32))
    assert np.all(read(file_bytes(whole, "TIFF"), 4, channels=1) == 100)
    real = Image.fromarray(np.full((4, 4), 0.4, dtype=np.float32))
    assert np.all(read(file_bytes(real, "TIFF"), 4) == 102)


def test_a_colour_space_with_no_direct_way_to_grey():
    lab = Image.new("LAB", (8, 8), (255, 128, 128))
    assert np.all(read(file_bytes(lab, "TIFF"), channels=1) > 250)


def test_resizing_is_antialiased():
    checks = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = read(file_bytes(Image.fromarray(checks)), 16, channels=1).astype(int)
    assert np.abs(pixels - 127).max() <= 3


def test_a_large_jpeg_keeps_its_look_and_is_not_called_small(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 512).astype(np.uint8), (512, 1))
    write(tmp_path / "ramp.jpg", Image.fromarray(ramp), quality=95)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = ImageData(str(tmp_path), image_size=128, channels=1)
    wanted = ramp.reshape(512, 128, 4).mean((0, 2))
    assert np.abs(data.images[0, 0, 60].numpy() - wanted).max() < 3 and data.num_small == 0


def test_centre_crop_and_random_crop():
    wide = Image.new("RGB", (24, 8), "black")
    wide.paste("white", (8, 0, 16, 8))
    assert np.all(read(file_bytes(wide)) == 255)
    ramp = Image.fromarray(np.tile(np.arange(100, dtype=np.uint8), (8, 1)))
    left = {int(read(file_bytes(ramp), crop="random", key=key)[0, 0, 0]) for key in range(60)}
    assert len(left) > 20 and min(left) < 15 and max(left) > 77  # 93 places, 0 to 92
    again = [read(file_bytes(ramp), crop="random", key=5) for _ in range(2)]
    assert np.array_equal(*again)
    with pytest.raises(ValueError, match="key"):
        read(file_bytes(ramp), crop="random")


def test_a_picture_one_pixel_high_costs_little():
    assert read(file_bytes(Image.new("L", (20000, 1), 9)), 64, channels=1).shape == (1, 64, 64)


@pytest.mark.parametrize("record", [None, {"bytes": None, "path": None}, {"bytes": b"", "path": "x.png"}])
def test_rows_without_a_picture(record):
    with pytest.raises(BrokenImageError):
        decode(record, image_size=8, channels=3)


def test_garbage_and_bombs(monkeypatch):
    for data in (b"hello", random.Random(0).randbytes(500), b"\x89PNG\r\n\x1a\n" + bytes(50)):
        with pytest.raises(BrokenImageError) as caught:
            read(data)
        assert "0x" not in str(caught.value)
    with pytest.raises(BrokenImageError):
        decode({"bytes": None, "path": "/no/such/file.png"}, image_size=8, channels=3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BrokenImageError, match="bomb"):
        read(file_bytes(noise(0)))


# ImageData


def test_broken_pictures_are_skipped_counted_and_warned_of(tmp_path):
    folder_of_noise(tmp_path, 4)
    truncated(tmp_path / "a/001-cut.jpg")
    (tmp_path / "b/000-text.png").write_text("no picture")
    with pytest.warns(UserWarning, match=r"2 of 6 images .* cannot be read") as caught:
        data = ImageData(str(tmp_path), image_size=16)
    assert len(caught) == 1
    assert [Path(image.name).name for image in data.broken] == ["001-cut.jpg", "000-text.png"]
    assert "truncated" in data.broken[0].reason and data.broken[1].reason == "not a picture"
    assert len(data) == 4 == len(data.images) and data.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(data[2]["image"], torch.from_numpy(np.array(noise(1))).permute(2, 0, 1))


def test_too_many_broken_pictures_are_refused(tmp_path):
    folder_of_noise(tmp_path, 2)
    for i in range(7):
        (tmp_path / f"a/bad{i}.png").write_text("no picture")
    with pytest.raises(UserError, match=r"7 of 9 .*bad4\.png \(not a picture\), \.\.\.;"):
        ImageData(str(tmp_path), image_size=16)
    with pytest.warns(UserWarning, match="7 of 9"):
        assert len(ImageData(str(tmp_path), image_size=16, max_broken=0.8)) == 2


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_all_broken_is_an_error_whatever_max_broken_says(tmp_path, cache_gb):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(UserError, match="cannot be read"):
        ImageData(str(tmp_path), image_size=16, max_broken=1.0, cache_gb=cache_gb)


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_small_pictures_are_enlarged_with_one_warning(tmp_path, cache_gb):
    folder_of_noise(tmp_path, 3)
    write(tmp_path / "a/tiny.png", Image.new("RGB", (3, 20), "red"))
    write(tmp_path / "a/wee.png", Image.new("RGB", (15, 15), "red"))
    with pytest.warns(UserWarning, match="2 of 5 images .* smaller than 16") as caught:
        data = ImageData(str(tmp_path), image_size=16, cache_gb=cache_gb)
    assert len(caught) == 1 and data.num_small == 2
    assert data[2]["image"].shape == (3, 16, 16)
    assert data[2]["image"].float().mean((1, 2)).tolist() == [255, 0, 0]


def test_a_broken_picture_met_late_is_replaced_by_the_next(tmp_path):
    folder_of_noise(tmp_path, 4)
    truncated(tmp_path / "b/zz.jpg")  # its header is sound, so opening the set finds nothing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = ImageData(str(tmp_path), image_size=16, cache_gb=0)
    assert not data.cached and len(data) == 5 and data.broken == []
    with pytest.warns(UserWarning, match=r"zz\.jpg"):
        item = data[4]
    assert item["index"] == 0 and torch.equal(item["image"], data[0]["image"]) and item["label"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data[4]["index"] == 0
    assert [Path(image.name).name for image in data.broken] == ["zz.jpg"]
    with pytest.raises(UserError, match="not held in memory"):
        _ = data.images


def test_what_a_loading_process_finds_is_known_here(tmp_path):
    folder_of_noise(tmp_path, 4)
    truncated(tmp_path / "b/zz.jpg")
    data = ImageData(str(tmp_path), image_size=16, cache_gb=0)
    list(batches(data, batch_size=5, seed=0, stop=1, workers=1))
    assert len(data.broken) == 1


def test_flip_and_crop_depend_on_the_key_alone(tmp_path):
    folder_of_noise(tmp_path, 2, width=48)
    data = ImageData(str(tmp_path), image_size=16, crop="random", flip=True)
    assert not data.cached
    first = [data[0, key] for key in range(40)]
    random.seed(1)
    torch.manual_seed(1)
    again = [data[0, key] for key in range(40)]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, again, strict=True))
    flips = [item["flipped"] for item in first]
    assert 8 < sum(flips) < 32
    plain = ImageData(str(tmp_path), image_size=16, crop="random")
    for key, item in enumerate(first):
        wanted = plain[0, key]["image"]
        assert torch.equal(item["image"], wanted.flip(-1) if item["flipped"] else wanted)
        assert not plain[0, key]["flipped"]
    assert len({bytes(plain[0, key]["image"].numpy().tobytes()) for key in range(40)}) > 10
    # Flips must not go with one side of the picture.
    ramp = Image.fromarray(np.tile(np.arange(216, dtype=np.uint8), (16, 1)))
    write(tmp_path / "ramp/0.png", ramp)
    ramps = ImageData(str(tmp_path / "ramp"), image_size=16, channels=1, crop="random", flip=True)
    items = [ramps[0, key] for key in range(300)]
    centre = {
        flipped: np.mean([item["image"].float().mean() for item in items if item["flipped"] == flipped])
        for flipped in (True, False)
    }
    assert abs(centre[True] - centre[False]) < 25


def test_a_plain_index_is_centred_and_not_flipped(tmp_path):
    folder_of_noise(tmp_path, 2, width=48)
    centred = ImageData(str(tmp_path), image_size=16)
    other = ImageData(str(tmp_path), image_size=16, crop="random", flip=True)
    assert torch.equal(centred[1]["image"], other[1]["image"]) and not other[1]["flipped"]
    assert torch.equal(centred[-1]["image"], centred[1]["image"])
    with pytest.raises(IndexError):
        centred[2]


def test_changing_an_item_leaves_the_set_alone(tmp_path):
    data = ImageData(str(folder_of_noise(tmp_path, 2)), image_size=16)
    before = data.images.clone()
    data[0]["image"].zero_()
    assert torch.equal(data.images, before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 0}, "image_size"),
        ({"channels": 2}, "channels"),
        ({"crop": "centre"}, "crop"),
        ({"max_broken": 2}, "max_broken"),
    ],
)
def test_impossible_settings(wrong, message):
    with pytest.raises(UserError, match=message):
        ImageData("digits", **{"image_size": 8, **wrong})


# Order and batches


def test_every_epoch_is_a_fresh_permutation_and_batches_run_over_its_end():
    pairs = [pair for batch in StepSampler(10, 4, 3, 0, 10) for pair in batch]
    epochs = [[index for index, _ in pairs[start : start + 10]] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({key for _, key in pairs}) == 40
    assert [len(batch) for batch in StepSampler(3, 8, 0, 0, 2)] == [8, 8]
    assert len(StepSampler(3, 8, 0, 5, 9)) == 4
    assert StepSampler(10, 4, -1, 0, 1).batch(0) != StepSampler(10, 4, 3, 0, 1).batch(0)
    with pytest.raises(UserError, match="empty"):
        StepSampler(0, 4, 0, 0, 1)


def test_any_step_is_reached_directly():
    whole = list(StepSampler(10, 4, 3, 0, 12))
    assert list(StepSampler(10, 4, 3, 7, 12)) == whole[7:]
    one = StepSampler(10, 4, 3, 0, 0)
    assert [one.batch(step) for step in (11, 2, 5)] == [whole[step] for step in (11, 2, 5)]


def test_memory_and_lazy_and_workers_give_the_same_batches_and_resume(tmp_path):
    folder_of_noise(tmp_path, 7, width=24)
    cached = ImageData(str(tmp_path), image_size=16, flip=True)
    lazy = ImageData(str(tmp_path), image_size=16, flip=True, cache_gb=0)
    assert cached.cached and not lazy.cached
    settings = {"batch_size": 4, "seed": 11, "stop": 6}
    state = torch.get_rng_state()
    whole = list(batches(cached, **settings))
    runs = [
        list(batches(lazy, **settings)),
        list(batches(lazy, **settings, workers=2)),
        list(batches(cached, **settings, workers=2)),
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert len(whole) == 6
    for run in runs:
        assert len(run) == 6 and all(same(a, b) for a, b in zip(whole, run, strict=True))
    for data in (cached, lazy):
        tail = list(batches(data, **settings, start=3))
        assert len(tail) == 3 and all(same(a, b) for a, b in zip(whole[3:], tail, strict=True))
    first = whole[0]
    assert first["image"].shape == (4, 3, 16, 16) and first["image"].dtype == torch.float32
    assert first["label"].dtype == first["index"].dtype == torch.int64
    flipped = torch.cat([batch["flipped"] for batch in whole])
    assert flipped.dtype == torch.bool and 0 < flipped.sum() < len(flipped)
    for batch in whole:
        for image, label, index, flip in zip(*batch.values(), strict=True):
            wanted = to_float(cached.images[index])
            assert torch.equal(image, wanted.flip(-1) if flip else wanted)
            assert label == cached.labels[index]


def test_random_crops_are_the_same_with_workers_and_change_between_visits(tmp_path):
    data = ImageData(str(folder_of_noise(tmp_path, 2, width=64)), image_size=16, crop="random", flip=True)
    here = list(batches(data, batch_size=2, seed=0, stop=4))
    there = list(batches(data, batch_size=2, seed=0, stop=4, workers=2))
    assert all(same(a, b) for a, b in zip(here, there, strict=True))
    visits = {
        image.numpy().tobytes()
        for batch in here
        for image, index in zip(batch["image"], batch["index"], strict=True)
        if index == 0
    }
    assert len(visits) == 4


def test_uint8_and_float():
    values = torch.arange(256, dtype=torch.uint8)
    floats = to_float(values)
    assert floats.min() == -1 and floats.max() == 1 and floats.dtype == torch.float32
    assert torch.equal(to_uint8(floats), values)
    assert to_uint8(torch.tensor([-3.0, 0.001, 7.0])).tolist() == [0, 128, 255]


# Real pictures


def test_digits():
    train, held_out = open_dataset("digits"), open_dataset("digits", "validation")
    assert (len(train), len(held_out)) == (1500, 297)
    names = [{row["path"] for row in rows["image"]} for rows in (train, held_out)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 1797
    # Shuffled: the scans come writer by writer, and the last 297 would be a few hands only.
    assert min(names[1]) < "digit-0050" and max(names[0]) > "digit-1750"
    assert all(set(rows["label"]) == set(range(10)) for rows in (train, held_out))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = ImageData("digits", image_size=32, channels=1, split="validation")
    assert data.images.shape == (297, 1, 32, 32) and data.images.dtype == torch.uint8
    assert data.class_names == [str(digit) for digit in range(10)] and data.broken == []
    with pytest.raises(UserError, match="no split 'test'"):
        open_dataset("digits", "test")
    # Zeros have a hole and ones have a stroke there.
    middle = {digit: data.images[data.labels == digit, 0, 13:19, 14:18].float().mean() for digit in (0, 1)}
    assert middle[0] < 60 and middle[1] > 150


def test_digits_at_16_are_the_scanned_ones():
    from sklearn.datasets import load_digits

    data = ImageData("digits", image_size=16, channels=1, split="validation")
    scans = load_digits()
    row = int(open_dataset("digits", "validation")[0]["image"]["path"][6:10])
    small = data.images[0, 0].float().reshape(8, 2, 8, 2).mean((1, 3))
    together = torch.stack([small.flatten(), torch.from_numpy(scans.images[row]).float().flatten()])
    assert torch.corrcoef(together)[0, 1] > 0.95
    assert data.labels[0] == scans.target[row]


@pytest.mark.skipif(not FACES.is_file(), reason="the shared data folder is absent (set LEDIFLOW_SHARED)")
def test_real_faces():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = ImageData(str(FACES), image_size=32, split="validation")
    assert len(data) == 700 and data.broken == [] and data.images.shape == (700, 3, 32, 32)
    assert data.class_names == ["age_18_29", "age_30_44", "age_45_59", "age_60_plus"]
    assert torch.bincount(data.labels).tolist() == [290, 180, 118, 112]
    # Aligned faces: the mean picture is skin-coloured and nearly symmetric.
    mean = data.images.float().mean(0)
    assert (mean[0] > mean[2]).float().mean() > 0.9
    assert (mean - mean.flip(-1)).abs().mean() < 6
