"""The README's examples, run as they stand on a tiny model and a few pictures."""

import re
import shlex
import shutil
import sys

import pytest
from conftest import ROOT, TINY
from PIL import Image

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def desk(tmp_path, monkeypatch, tiny_mean_run):
    """A folder as the reader's: the demo was run, and there are photos."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_mean_run, tmp_path / "runs" / "demo")
    (tmp_path / "photos").mkdir()
    for i in range(6):
        Image.new("RGB", (80, 70 + i), (40 * i, 120, 200 - 30 * i)).save(tmp_path / "photos" / f"{i}.jpg")
    return tmp_path


def test_python_example(desk, capsys):
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    promised = re.search(r"\{'sampler'.*?\}", code).group()
    assert capsys.readouterr().out.strip() == promised
    assert Image.open(desk / "digit.png").size == (16, 16)


def test_command_line_examples(desk, monkeypatch, capsys):
    from lediflow.cli.app import main

    commands = [shlex.split(line, comments=True) for line in "".join(blocks("bash")).splitlines()]
    commands = [c for c in commands if c and c[0] == "lediflow"]
    assert [c[1] for c in commands] == [
        "--version", "presets", "train", "train", "sample", "sample", "train", "sample",
    ]  # fmt: skip
    # the example's own preset, with narrow networks and two steps of two images
    quick = [s for s in TINY if s.startswith("training") and "stages" not in s] + [
        *(
            f"training.{s}.{k}=2"
            for s in ("auxiliary", "flow", "sampler", "baseline", "meanflow", "sampler_meanflow")
            for k in ("steps", "batch_size")
        ),
        *("auxiliary.widths=[32,32,32]", "flow.widths=[64,64]", "sampler.widths=[64]"),
    ]
    for command in commands:
        extra = [part for s in quick for part in ("--set", s)] if command[1] == "train" else []
        monkeypatch.setattr(sys, "argv", command + extra)
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code in (0, None), capsys.readouterr().err
    assert len(list((desk / "samples").glob("0*.png"))) == 16
    for folder in ("samples-fm", "samples-two"):
        assert Image.open(desk / folder / "000000.png").size == (64, 64)
    said = capsys.readouterr().out
    assert "flow 1 mean step, latent sampler 1 mean step" in said
    assert "in all, previews and checkpoints apart" in said, "the dry run"


def test_make_targets_and_links_exist():
    makefile = (ROOT / "Makefile").read_text()
    for line in "".join(blocks("bash")).splitlines():
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
