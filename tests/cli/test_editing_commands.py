"""The editing commands as a user types them: files, reports, exit codes, and images made again."""

import json
import shutil

import numpy as np
import pytest
from conftest import giant_png, refused
from PIL import Image

from lediflow.pipelines.recipes import read_recipe

CPU = ("--device", "cpu")
FEW = ("--steps", 1, "--solver", "euler", *CPU)


def pixels(path):
    with Image.open(path) as picture:
        return np.array(picture)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "more/a.png"):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / name)
    return folder


def test_a_folder_is_reconstructed_in_order_and_a_broken_file_does_not_stop_it(
    lediflow, tiny_run, photos, tmp_path
):
    (photos / "aa.png").write_bytes(b"no picture")
    (photos / "notes.txt").write_text("not looked at")
    result = lediflow("reconstruct", tiny_run, photos, *FEW, "--output", tmp_path / "out", "--json")
    assert result.returncode == 1, "one failed"
    assert "aa.png" in result.stderr and "not a picture" in result.stderr
    report = json.loads(result.stdout)
    assert [entry.get("files", "error") for entry in report["images"]] == [
        [str(tmp_path / "out" / "a.png")],
        "error",
        [str(tmp_path / "out" / "b.png")],
        [str(tmp_path / "out" / "a-2.png")],
    ]
    assert report["failed"] == 1
    assert report["images"][0]["nfe"] == {"encoder": 1, "decoder": 1, "flow": 1}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a-2.png", "a.png", "b.png", "grid.png",
    ]  # fmt: skip
    assert Image.open(tmp_path / "out" / "b.png").size == (16, 16)
    assert Image.open(tmp_path / "out" / "grid.png").size == (4 * 66 + 2, 3 * 66 + 2)


def test_images_say_how_they_were_made_and_are_made_again_bit_for_bit(
    lediflow, tiny_run, photos, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run / "pipeline", tmp_path / "model")
    few = ("--latent-steps", 1, *FEW)
    assert lediflow("sample", "model", "-n", 3, "--batch-size", 2, *few, "--output", "s").returncode == 0
    assert lediflow("vary", "model", "photos/b.jpg", "-n", 3, *few, "--output", "v").returncode == 0
    assert lediflow("interpolate", "model", "--seeds", "1,2", "-n", 3, *few, "--output", "i").returncode == 0
    with Image.open("v/b-1.png") as picture:
        assert picture.text["Software"].startswith("lediflow ")
        assert picture.text["command"].startswith("lediflow vary model photos/b.jpg --strength 0.5 -n 3 ")
        assert json.loads(picture.text["lediflow"])["settings"]["seed"] == 0
    shutil.move("model", "moved")
    for name in ("s/000001.png", "v/b-1.png", "i/000002.png"):
        before = pixels(name)
        result = lediflow("sample", "--again", name, "--model", "moved", "--output", "again", *CPU, "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["same"] is True
        assert np.array_equal(pixels(f"again/{name[2:]}"), before)
        assert read_recipe(tmp_path / "again" / name[2:]) == read_recipe(tmp_path / name)

    again = ("sample", "--again", "s/000001.png", "--output")
    refused(lediflow(*again, "new"), "no model model")
    refused(lediflow(*again, "s", "--model", "moved"), "there already")
    other = tiny_run / "baseline" / "pipeline"
    refused(lediflow(*again, "new", "--model", other), "other weights than")
    Image.open("v/b-0.png").save("bare.png")
    refused(lediflow("sample", "--again", "bare.png"), "'bare.png' does not say how it was made")
    refused(lediflow("sample", "--again", "photos/b.jpg"), "does not say how it was made")
    refused(lediflow("sample", "--again", "nowhere.png"), "cannot read 'nowhere.png'")
    Image.new("RGB", (30, 40)).save("photos/b.jpg")
    refused(
        lediflow("sample", "--again", "v/b-1.png", "--model", "moved", "--output", "new"),
        "'photos/b.jpg' is not the file that it was",
    )
    assert not (tmp_path / "new").exists()
    refused(lediflow("sample"), "name the model")


def test_the_command_in_a_png_makes_it_again(lediflow, tiny_run, photos, tmp_path):
    import shlex

    made = lediflow("restyle", tiny_run, photos / "a.png", "-n", 2, *FEW, "--output", tmp_path / "one")
    assert made.returncode == 0, made.stderr
    command = shlex.split(read_recipe(tmp_path / "one" / "a-1.png").command())
    assert command[:2] == ["lediflow", "restyle"]
    assert lediflow(*command[1:], *CPU, "--output", tmp_path / "two").returncode == 0
    assert np.array_equal(pixels(tmp_path / "two" / "a-1.png"), pixels(tmp_path / "one" / "a-1.png"))


def test_inpaint_keeps_what_is_not_masked(lediflow, tiny_run, photos, tmp_path):
    (tmp_path / "masks").mkdir()
    mask = Image.new("L", (40, 30))
    mask.paste(255, (10, 8, 25, 20))
    for name in ("a", "b"):
        mask.save(tmp_path / "masks" / f"{name}.png")
    common = ("--padding-mask-crop", 4, *FEW, "--output")
    result = lediflow(
        "inpaint", tiny_run, photos, "--mask", tmp_path / "masks", "-n", 2, *common, tmp_path / "out"
    )
    assert result.returncode == 0, result.stderr
    assert "6 images in" in result.stdout and "encoder 1, decoder 1, flow 1" in result.stdout
    before = np.array(Image.open(photos / "a.png").convert("L"))
    after, black = pixels(tmp_path / "out" / "a-1.png"), np.array(mask) == 0
    assert np.array_equal(after[black], before[black]) and (after != before)[~black].mean() > 0.8
    cut = Image.open(photos / "a.png").convert("RGBA")
    cut.putalpha(Image.eval(mask, lambda v: 255 - v))
    cut.save(tmp_path / "cut.png")
    one = ("inpaint", tiny_run / "baseline", tmp_path / "cut.png", "--mask", "alpha")
    assert lediflow(*one, *common, tmp_path / "alpha").returncode == 0
    after = pixels(tmp_path / "alpha" / "cut.png")
    assert np.array_equal(after[black], before[black])
    again = ("sample", "--again", tmp_path / "alpha" / "cut.png", "--output", tmp_path / "again", *CPU)
    assert "bit for bit" in lediflow(*again).stdout


def test_interpolate_writes_an_animation(lediflow, tiny_run, photos, tmp_path):
    ends = (photos / "a.png", photos / "b.jpg", photos / "more" / "a.png")
    result = lediflow(
        "interpolate", tiny_run, *ends, "-n", 3, "--loop", "--animation", "webp", "--fps", 20, "--scale", 2,
        *FEW, "--output", tmp_path / "out", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert len(report["images"][0]["files"]) == 7
    with Image.open(tmp_path / "out" / "animation.webp") as film:
        assert film.n_frames == 6 and film.size == (32, 32)
    assert Image.open(tmp_path / "out" / "grid.png").size == (2 * 66 + 2, 3 * 66 + 2)


def test_what_cannot_be_edited_is_refused_and_nothing_is_written(lediflow, tiny_run, photos, tmp_path):
    out = tmp_path / "out"
    to = ("--output", out)
    (tmp_path / "empty").mkdir()
    a = photos / "a.png"
    Image.new("L", (40, 30)).save(tmp_path / "black.png")
    Image.new("L", (30, 40), 255).save(tmp_path / "turned.png")
    frames = [Image.new("L", (8, 8), 90 * i) for i in range(2)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    giant_png(tmp_path / "giant.png", 20_000)
    for command, message in (
        (("vary", tiny_run, tmp_path / "empty"), "holds no images"),
        (("vary", tiny_run, tmp_path / "nowhere.png"), "there is no file or folder"),
        (("vary", tiny_run, a, "--strength", 1.5), "strength must be from 0 to 1, not 1.5"),
        (("restyle", tiny_run, a, "--strength", -1), "strength must be from 0 to 1, not -1"),
        (("inpaint", tiny_run, a, "--mask", tmp_path / "black.png"), "black everywhere"),
        (("inpaint", tiny_run, a, "--mask", tmp_path / "turned.png"), "give a mask of the image's size"),
        (("inpaint", tiny_run, a, "--mask", tmp_path / "none.png"), "there is no mask"),
        (("inpaint", tiny_run, a, "--mask", tmp_path / "empty"), "has no mask named 'a'"),
        (("inpaint", tiny_run, a, "--mask", "alpha"), "no alpha channel"),
        (("reconstruct", tiny_run, tmp_path / "moving.gif"), "animated"),
        (("reconstruct", tiny_run, tmp_path / "giant.png"), "400000000 pixels) exceeds limit"),
        (("vary", tiny_run / "baseline", a), "no auxiliary model and so no latent z to vary"),
        (("interpolate", tiny_run / "baseline", "--seeds", "1,2"), "no latent z to interpolate"),
        (("interpolate", tiny_run, a), "between two or more images or seeds, not 1"),
        (("interpolate", tiny_run, a, "--seeds", "1"), "and not both"),
        (("interpolate", tiny_run, "--seeds", "1,x"), "whole numbers"),
        (("interpolate", tiny_run, "--seeds", "1,2", "--animation", "avi"), "unknown animation 'avi'"),
        (("interpolate", tiny_run, "--seeds", "1,2", "--animation", "gif", "--fps", 0), "images a second"),
    ):
        refused(lediflow(*command, *to), message)
        assert not out.exists(), command
    refused(lediflow("vary", tiny_run, a, "--output", photos), "never overwritten")
    assert len(list(photos.iterdir())) == 3
    out.mkdir()
    (out / "mine.png").write_bytes(b"")
    refused(lediflow("vary", tiny_run, a, *to), "give --overwrite")


def test_images_of_two_models_have_no_way_between_them(lediflow, tiny_run, tmp_path):
    for name, model in (("a", tiny_run), ("b", tiny_run / "baseline")):
        few = ("-n", 1, *FEW, "--output", tmp_path / name)
        assert lediflow("sample", model, *few).returncode == 0
    ends = (tmp_path / "a" / "000000.png", tmp_path / "b" / "000000.png")
    refused(lediflow("interpolate", tiny_run, *ends, "--output", tmp_path / "out"), "two different models")
    assert not (tmp_path / "out").exists()
