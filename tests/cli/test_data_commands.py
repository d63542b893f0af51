"""`lediflow data inspect` and `lediflow encode` as a user types them."""

import json
import os
import shutil

import pytest
from PIL import Image

from lediflow import progress


@pytest.fixture
def photos(tmp_path):
    for n in range(6):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (40 * n, 0, 0)).save(tmp_path / "photos" / f"{n}.png")
    return tmp_path / "photos"


def test_inspection_tells_how_far_it_is_in_a_log(lediflow, photos, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    result = lediflow("data", "inspect", photos, "--json")
    assert "inspect 6/6" in result.stderr and "images/s" in result.stderr
    assert json.loads(result.stdout)["images"] == 6, "stdout has the report alone"


def test_encoding_tells_how_far_it_is_and_goes_on_however_the_folder_is_written(
    lediflow, photos, tiny_codec, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    options = ("--codec", tiny_codec, "--image-size", 16, "--shard-size", 2, "--device", "cpu")
    result = lediflow("encode", "photos", *options, "--output", "latents")
    assert result.returncode == 0, result.stderr
    assert "encode 2/6" in result.stderr and "encode 6/6" in result.stderr
    before = {path.name: path.read_bytes() for path in (tmp_path / "latents").iterdir()}
    for spelling in ("photos/", "./photos", "photos//.", photos):
        (tmp_path / "latents" / "latents.json").unlink()
        next((tmp_path / "latents").glob("*-00001-*")).unlink()
        result = lediflow("encode", spelling, *options, "--output", "latents")
        assert result.returncode == 0, result.stderr
        assert "encode 2/2" in result.stderr, "one shard was missing"
    told = json.loads(lediflow("encode", "photos/", *options, "--output", "again", "--json").stdout)
    assert told == json.loads((tmp_path / "again" / "latents.json").read_text())
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert again == before
    shutil.copytree(photos, tmp_path / "others")
    result = lediflow("encode", "others", *options, "--output", "latents")
    assert result.returncode == 2 and "dataset: photos there, others now" in result.stderr


def test_pairs_for_an_upsampler(lediflow, photos, tiny_codec, tmp_path):
    options = ("--codec", tiny_codec, "--output", tmp_path / "pairs")
    for wrong in ("8-16", "8:", ":16", "a:16"):
        result = lediflow("encode", photos, *options, "--pairs", wrong)
        assert result.returncode == 2 and "write it as LOW:HIGH" in result.stderr
    result = lediflow("encode", photos, *options, "--pairs", "5:16")
    assert result.returncode == 2 and "5 and 16 px" in result.stderr
    assert lediflow("encode", photos, *options, "--pairs", "8:16").returncode == 0
    meta = json.loads((tmp_path / "pairs" / "latents.json").read_text())
    assert (meta["low_size"], meta["image_size"], meta["enlarge"]) == (8, 16, "latents")
    result = lediflow("encode", photos, *options, "--image-size", "16")
    assert result.returncode == 2 and "low_size: 8 there, None now" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "encode"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    lediflow, photos, tiny_codec, tmp_path, monkeypatch, command
):
    (tmp_path / "file").write_text("")
    from lediflow.data import encode, inspect

    monkeypatch.setattr(inspect, "inspect_dataset", lambda *a, **k: pytest.fail("worked first"))
    monkeypatch.setattr(encode, "encode", lambda *a, **k: pytest.fail("worked first"))
    words = ("data", "inspect", photos) if command == "inspect" else ("encode", photos, "--codec", tiny_codec)
    for output in (tmp_path / "file", tmp_path / "file" / "below", "/proc/lediflow"):
        if command == "inspect" or output != "/proc/lediflow" or os.path.isdir("/proc/self"):
            result = lediflow(*words, "--output", output)
            assert result.returncode == 2, result.stderr
            assert "cannot write" in result.stderr and "choose another --output" in result.stderr


def test_names_from_strangers_reach_the_terminal_escaped(lediflow, photos):
    (photos / "\x1b[2Jgone.png").write_bytes(b"no picture")
    result = lediflow("data", "inspect", photos)
    assert "\x1b" not in result.stdout + result.stderr and r"\x1b[2Jgone.png: not a picture" in result.stdout
    result = lediflow("data", "inspect", "/no/\x1b[2Jfolder")
    assert result.returncode == 2 and "\x1b" not in result.stderr and "error: " in result.stderr
