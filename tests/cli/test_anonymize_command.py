"""`lediflow anonymize` as a user types it: files, reports, exit codes, and no original touched."""

import json

import numpy as np
import pytest
from conftest import TINY, random_network, refused
from PIL import Image

from lediflow import FlowMatchingPipeline, LeDiFlowPipeline, faces
from lediflow.faces import Face
from lediflow.training.config import load_config

FEW = ("--steps", 1, "--solver", "euler", "--latent-steps", 1, "--device", "cpu")


class Detector:
    """Stands for the real one: a bright photo has a face, a dark one none."""

    def __init__(self, threads=None):
        pass

    check = staticmethod(faces.FaceDetector.check)

    def __call__(self, photo, **options):
        bright = np.asarray(photo.convert("L")).mean() > 60
        return [Face((8.0, 6.0, 24.0, 24.0), 0.75)] if bright else []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = load_config("digits", TINY)
    parts = {name: random_network(config, name) for name in ("auxiliary", "flow", "sampler")}
    folder = tmp_path_factory.mktemp("models") / "digits"
    LeDiFlowPipeline(**parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "plain"
    FlowMatchingPipeline(flow=random_network(load_config("digits", TINY), "baseline")).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def detector(monkeypatch):
    monkeypatch.setattr(faces, "FaceDetector", Detector)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x010F] = "maker of the camera"
    for name in ("a.jpg", "a.png", "sub/b.png"):
        picture = Image.fromarray(rng.integers(100, 256, (30, 40, 3), dtype=np.uint8))
        picture.save(folder / name, exif=exif)
    Image.new("RGB", (30, 30), "black").save(folder / "dark.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not looked at")
    return folder


def stored(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_what_can_go_wrong(lediflow, model, photos, tmp_path):
    before, out = stored(photos), tmp_path / "out"
    result = lediflow("anonymize", model, photos, "--output", out, *FEW, "--json")
    assert result.returncode == 1, "one has no face and one cannot be read"
    report = json.loads(result.stdout)
    assert (report["found"], report["treated"]) == (3, 3)
    assert report["without_faces"] == [str(photos / "dark.png")]
    assert report["unreadable"] == [str(photos / "broken.jpg")]
    assert "seed" not in result.stdout
    made = {photo["file"]: photo for photo in report["photos"]}
    names = {"a.jpg": "a.png", "a.png": "a-2.png", "sub/b.png": "sub/b.png"}
    for name, new in names.items():
        photo = made[str(photos / name)]
        assert photo["output"] == str(out / new)
        assert photo["faces"] == [{"box": [8, 6, 16, 18], "score": 0.75}]
        old, picture = Image.open(photos / name).convert("RGB"), Image.open(out / new)
        assert set(picture.info) == {"Software", "Description"}
        changed = (np.asarray(picture) != np.asarray(old)).any(-1)
        assert changed[10:20, 12:20].mean() > 0.9
        assert not changed[:, 26:].any()
    assert set(stored(out)) == {(out / new).relative_to(out) for new in names.values()}
    assert "not a picture" in made[str(photos / "broken.jpg")]["error"]
    assert stored(photos) == before


def test_what_is_printed_names_the_photos_to_look_at(lediflow, model, photos, tmp_path):
    chosen = (photos / "a.jpg", photos / "dark.png")
    result = lediflow("anonymize", model, *chosen, "-o", tmp_path / "out", *FEW)
    assert result.returncode == 1
    assert "faces found and replaced: 1, in 1 of 2 photos" in result.stdout
    assert "no face was found in, so nothing was written of:\n  " + str(chosen[1]) in result.stdout
    assert "look at each photo before you hand it on" in result.stdout


def test_a_preview_replaces_nothing_and_needs_no_model(lediflow, photos, tmp_path):
    result = lediflow("anonymize", "no/such/model", photos, "-o", tmp_path / "out", "--show-boxes", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["treated"] == 0
    framed = np.asarray(Image.open(tmp_path / "out" / "sub" / "b.boxes.png")).astype(int)
    original = np.asarray(Image.open(photos / "sub" / "b.png")).astype(int)
    assert (framed[6, 8:24] == (255, 40, 40)).all()
    assert np.array_equal(framed[26:], original[26:])


def test_boxes_and_masks_need_no_detector(lediflow, model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(faces, "FaceDetector", None)
    mask = Image.new("L", (40, 30))
    mask.paste(255, (2, 2, 12, 14))
    mask.save(tmp_path / "mask.png")
    one = photos / "sub" / "b.png"
    for name, where in (
        ("boxes", ("--boxes", "2,2,10,12", "--boxes", "20,10,12,12")),
        ("again", ("--boxes", "2,2,10,12", "--boxes", "20,10,12,12")),
        ("mask", ("--mask", tmp_path / "mask.png")),
    ):
        result = lediflow("anonymize", model, one, "-o", tmp_path / name, *where, "--seed", 3, *FEW)
        assert result.returncode == 0, result.stderr
    boxes, again, masked = (
        np.asarray(Image.open(tmp_path / n / "b.png")) for n in ("boxes", "again", "mask")
    )
    assert np.array_equal(boxes, again)
    changed = (masked != np.asarray(Image.open(one))).any(-1)
    assert changed[2:14, 2:12].mean() > 0.9
    assert not changed[:, 12:].any()


def test_persons_are_told_when_faces_are_to_be_consistent(lediflow, model, photos, tmp_path):
    twice = tmp_path / "again.png"
    twice.write_bytes((photos / "a.png").read_bytes())
    result = lediflow(
        "anonymize", model, photos / "a.png", twice, photos / "sub", "-o", tmp_path / "out",
        "--consistent", "--same-person", 0.999, "--json", *FEW,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert [photo["faces"][0]["person"] for photo in report["photos"]] == [0, 0, 1]
    first, second = (np.asarray(Image.open(photo["output"])) for photo in report["photos"][:2])
    assert np.array_equal(first, second)


def test_originals_are_safe_and_mistakes_write_nothing(lediflow, model, plain, photos, tmp_path):
    before = stored(tmp_path)
    one = photos / "a.png"
    (tmp_path / "links").symlink_to(photos / "sub")
    out = tmp_path / "out"
    for given, message in (
        ((photos, "-o", photos), "no original is overwritten"),
        ((photos, "-o", photos / "new"), "no original is overwritten"),
        ((photos / "sub", "-o", photos), "no original is overwritten"),
        ((one, "-o", photos), "no original is overwritten"),
        ((photos / "sub", "-o", tmp_path / "links"), "no original is overwritten"),
        ((photos / "missing.png", "-o", out), "no file or folder"),
        ((one, "-o", out, "--strength", 1.5), "strength must be from 0 to 1"),
        ((one, "-o", out, "--content", "noise"), "masked_content must be"),
        ((one, "-o", out, "--boxes", "1,2,3"), "x, y, width and height"),
        ((one, "-o", out, "--boxes", "a,b,c,d"), "a box is four numbers"),
        ((one, "-o", out, "--boxes", "30,20,20,20"), "leaves the photo, which is 40x30"),
        ((photos, "-o", out, "--boxes", "1,2,9,9"), "belong to one photo, not to 5"),
        ((one, "-o", out, "--boxes", "1,2,9,9", "--mask", one), "not both"),
        ((one, "-o", out, "--mask", photos / "dark.png"), "30x30"),
        ((one, "-o", out, "--smallest", 1), "at least 4 pixels"),
        ((one, "-o", out, "--consistent", "--features", "network"), "and --same-person"),
    ):
        assert refused(lediflow("anonymize", model, *given, *FEW), message)
    assert refused(lediflow("anonymize", plain, one, "-o", out, *FEW), "plain flow matching")
    assert stored(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert refused(lediflow("anonymize", model, tmp_path / "empty", "-o", out), "holds no images")


def test_earlier_results_are_replaced_only_when_asked(lediflow, model, photos, tmp_path):
    command = ("anonymize", model, photos / "a.png", "-o", tmp_path / "out", *FEW)
    assert lediflow(*command).returncode == 0
    first = (tmp_path / "out" / "a.png").read_bytes()
    assert refused(lediflow(*command), "is there already; give --overwrite")
    assert (tmp_path / "out" / "a.png").read_bytes() == first
    assert lediflow(*command, "--overwrite").returncode == 0
    assert (tmp_path / "out" / "a.png").read_bytes() != first, "another secret seed"


def test_help_teaches_with_an_example(lediflow):
    result = lediflow("anonymize", "--help")
    assert result.returncode == 0
    assert "lediflow anonymize runs/faces photos/" in result.stdout
