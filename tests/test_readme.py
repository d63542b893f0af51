"""The README's examples, run as they stand on a tiny model and a few pictures."""

import re
import shlex
import sys

import pytest
from conftest import ROOT, TINY
from PIL import Image

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder as the reader's: there are photos."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(6):
        Image.new("RGB", (80, 70 + i), (40 * i, 120, 200 - 30 * i)).save(tmp_path / "photos" / f"{i}.jpg")
    return tmp_path


def test_python_example(desk, capsys):
    (code,) = blocks("python")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    promised = re.search(r"\{'sampler'.*?\}", code).group()
    assert capsys.readouterr().out.strip() == promised
    assert Image.open(desk / "emoji.png").size == (32, 32)
    assert len(names["hearts"]) == 4 and len(names["between"]) == 8


def test_command_line_examples(desk, monkeypatch, capsys):
    from lediflow.cli.app import main

    commands = [shlex.split(line, comments=True) for line in "".join(blocks("bash")).splitlines()]
    commands = [c for c in commands if c and c[0] == "lediflow"]
    assert [c[1] for c in commands] == ["sample", "data", "train", "train", "sample", "app"]
    assert commands.pop() == ["lediflow", "app", "runs/mine"]  # tests/app opens the page
    # the example's own preset, with narrow networks and two steps of two images
    quick = [s for s in TINY if s.startswith("training") and "stages" not in s] + [
        *(
            f"training.{s}.{k}=2"
            for s in ("auxiliary", "flow", "weak_flow", "sampler", "meanflow", "sampler_meanflow")
            for k in ("steps", "batch_size")
        ),
        *("auxiliary.widths=[32,32,32]", "flow.widths=[64,64]", "sampler.widths=[64]"),
        "training.meanflow.autoguidance=null",  # or the search for its strength takes a minute
    ]
    for command in commands:
        extra = [part for s in quick for part in ("--set", s)] if command[1] == "train" else []
        monkeypatch.setattr(sys, "argv", command + extra)
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code in (0, None), capsys.readouterr().err
    assert len(list((desk / "samples").glob("0*.png"))) == 64
    assert len(list((desk / "pictures").glob("0*.png"))) == 16
    assert Image.open(desk / "pictures" / "000000.png").size == (64, 64)
    said = capsys.readouterr().out
    assert said.count("flow 1 mean step, latent sampler 1 mean step") == 2
    assert "in all, previews and checkpoints apart" in said, "the dry run"


def test_make_targets_and_links_exist():
    makefile = (ROOT / "Makefile").read_text()
    for line in "".join(blocks("bash")).splitlines():
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
