"""Pictures of files and folders: names, what is broken, what is there already, and seeds by name."""

import pytest
from PIL import Image
from toy_upsampler import TOLD, Told

from lediflow import UserError
from lediflow.pipelines.upsample import FlowUpsamplePipeline
from lediflow.pipelines.upsample_files import picture_files, upsample_files


@pytest.fixture
def pipeline():
    made = FlowUpsamplePipeline(Told(conditions=TOLD))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def pictures(tmp_path):
    """A folder with a picture, the same in another format, one in a subfolder, a broken one, and a text."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (5, 3), "red").save(folder / "a.png")
    Image.new("L", (4, 4)).save(folder / "a.bmp")
    turned = Image.new("RGB", (6, 2))
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(folder / "sub" / "b.jpg", exif=exif)
    (folder / "sub" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    (folder / "note.txt").write_text("no picture")
    return folder


def run(pipeline, files, output, **options):
    request = {"steps": 1, **options.pop("request", {})}
    return upsample_files(pipeline, files, output, request=request, num_inference_steps=1, **options)


def test_a_folder_becomes_a_folder_and_a_broken_file_does_not_stop_the_others(pipeline, pictures, tmp_path):
    files = picture_files([pictures])
    assert set(files) == {"a.png", "a.png.png", "sub/b.png", "sub/broken.png"}
    counts = []
    done = run(pipeline, files, tmp_path / "out", progress=lambda *at: counts.append(at))
    assert done.made == {"a.png": (16, 16), "a.png.png": (20, 12), "sub/b.png": (8, 24)}, "turned upright"
    for name, size in done.made.items():
        with Image.open(tmp_path / "out" / name) as image:
            assert image.size == size and image.mode == "RGB"
    assert [one.name for one in done.broken] == [str(pictures / "sub" / "broken.png")]
    assert done.nfe == {"flow": 1} and counts == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not list((tmp_path / "out").rglob(".*")), "nothing half-written is left"


def test_what_is_there_is_kept_and_another_request_is_not_mixed_in(pipeline, pictures, tmp_path):
    output, files = tmp_path / "out", picture_files([pictures / "a.png", pictures / "sub" / "b.jpg"])
    run(pipeline, files, output)
    whole = {name: (output / name).read_bytes() for name in files}
    (output / "b.png").unlink()
    again = run(pipeline, files, output)
    assert (again.found, list(again.made)) == (1, ["b.png"])
    assert {name: (output / name).read_bytes() for name in files} == whole
    with pytest.raises(UserError, match=r"another request \(steps: 1 there, 2 now\); give --overwrite"):
        run(pipeline, files, output, request={"steps": 2})
    assert len(run(pipeline, files, output, request={"steps": 2}, overwrite=True).made) == 2


def test_a_pictures_noise_follows_from_seed_and_name_not_from_the_others(pipeline, pictures, tmp_path):
    def made(name, sources, seed=0):
        run(pipeline, picture_files(sources), tmp_path / name, seed=seed)
        return (tmp_path / name / "b.png").read_bytes()

    alone = made("alone", [pictures / "sub" / "b.jpg"])
    assert alone == made("both", [pictures / "a.png", pictures / "sub" / "b.jpg"])
    assert alone != made("seed", [pictures / "sub" / "b.jpg"], seed=1)


def test_what_cannot_work_is_refused_before_anything_is_made(pipeline, pictures, tmp_path):
    with pytest.raises(UserError, match="no file or folder '.*nowhere'"):
        picture_files([pictures / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures in"):
        picture_files([tmp_path / "empty"])
    with pytest.raises(UserError, match="scale 8 is no power"):
        run(pipeline, picture_files([pictures]), tmp_path / "out", scale=8)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        run(pipeline, picture_files([pictures]), tmp_path / "file")
    assert not (tmp_path / "out").exists()
