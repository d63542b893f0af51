"""`lediflow upsample` as a user types it."""

import json
import sys

import pytest
from PIL import Image

from lediflow.networks.velocity import VelocityTransformer
from lediflow.pipelines.upsample import FlowUpsamplePipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "upsampler"
    network = VelocityTransformer(
        16, 3, 4, (16,), (1,), d_head=8, mapping_width=16,
        conditions={"image": {"embedder": "grid", "channels": 3, "size": 16}},
    )  # fmt: skip
    FlowUpsamplePipeline(network, scale=2).save_pretrained(folder)
    return folder


@pytest.fixture
def lediflow(monkeypatch, capsys):
    from lediflow.cli.app import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lediflow", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run


def test_pictures_are_enlarged_and_the_report_says_how(lediflow, model, tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    (tmp_path / "broken.jpg").write_text("no picture")
    output = tmp_path / "out"
    command = [
        "upsample",
        model,
        tmp_path / "a.png",
        tmp_path / "broken.jpg",
        "--output",
        output,
        "--device",
        "cpu",
    ]
    code, out, _ = lediflow(*command, "--scale", 4, "--steps", 2, "--json")
    report = json.loads(out)
    assert code == 0 and report["images"] == {"a.png": [24, 16]} and report["nfe"] == {"flow": 4}
    assert (report["scale"], report["steps"], report["solver"], report["noise_level"]) == (
        4,
        2,
        "euler",
        200,
    )
    assert [one["reason"] for one in report["broken"]] == ["not a picture"]
    code, out, _ = lediflow(*command, "--scale", 4, "--steps", 2)
    assert code == 0 and "0 images, 4 times as large" in out and "1 were there already" in out
    assert f"could not enlarge {tmp_path / 'broken.jpg'}: not a picture" in out


def test_mistakes_are_said_in_a_line(lediflow, model, tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    (tmp_path / "broken.jpg").write_text("no picture")
    for arguments, message in (
        ([model, tmp_path / "a.png", "--scale", 3], "trained to enlarge 2 times, and scale 3 is no power"),
        ([model, tmp_path / "a.png", "--tile-size", 10], "tile_size 10 must be a multiple of 4"),
        ([model, tmp_path / "nothing.png"], "no file or folder"),
        ([model, tmp_path / "broken.jpg"], "none of the pictures could be enlarged"),
        ([tmp_path, tmp_path / "a.png"], "has no trained pipeline"),
    ):
        code, _, err = lediflow("upsample", *arguments, "--output", tmp_path / "out", "--device", "cpu")
        assert code == 2 and message in err and "Traceback" not in err
