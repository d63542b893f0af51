"""File names of every kind, links, and arguments that name nothing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from lediflow.data.images import ImageData
from lediflow.data.inspect import contact_sheet, inspect_dataset
from lediflow.data.listing import open_dataset
from lediflow.errors import UserError

NOT_UTF8 = os.fsdecode(b"caf\xe9")
EVIL = "\x1b]0;owned\x07\x1b[31mred\r\n\u202egnp.png"


def picture(path: Path, color=(0, 255, 0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        Image.new("RGB", (16, 16), color).save(file, "PNG")
    return path


@pytest.fixture
def odd_names(tmp_path):
    """Folders and files, sound and broken, whose names are not UTF-8 or not printable."""
    root = tmp_path / f"set-{NOT_UTF8}"
    try:
        picture(root / NOT_UTF8 / f"{NOT_UTF8}.png")
        picture(root / "plain" / "日本 语.png")
        (root / "plain" / f"bad-{NOT_UTF8}.png").write_bytes(b"no picture")
        (root / "plain" / EVIL).write_bytes(b"no picture")
    except OSError:
        pytest.skip("this file system takes no such names")
    return root


def printable(text: str) -> bool:
    text.encode("utf-8")
    return not any(ord(c) < 32 or ord(c) in (0x7F, 0x9B, 0x202E) for c in text)


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_names_that_are_not_utf8_are_read_and_shown_escaped(odd_names, cache_gb):
    with pytest.warns(UserWarning) as caught:
        data = ImageData(str(odd_names), image_size=16, cache_gb=cache_gb)
    assert all(printable(str(warning.message)) for warning in caught)
    assert data.class_names == [r"caf\xe9", "plain"]
    assert data[0]["image"][:, 0, 0].tolist() == [0, 255, 0] and data[0]["label"] == 0
    names = [image.name for image in data.broken]
    assert len(names) == 2 and all(map(printable, names))
    assert any(r"\x1b]0;owned\x07\x1b[31mred\r\n\u202egnp.png" in name for name in names)


def test_streams_and_workers_read_them_too(odd_names):
    from lediflow.data.batches import batches
    from lediflow.data.streams import StreamData

    data = StreamData(str(odd_names), image_size=16)
    with pytest.warns(UserWarning):
        batch = next(batches(data, batch_size=2, seed=0, stop=1, workers=1))
    assert sorted(batch["label"].tolist()) == [0, 1] and all(printable(image.name) for image in data.broken)


def test_inspection_can_be_printed_and_written(odd_names, monkeypatch, tmp_path, capsys):
    report = inspect_dataset(str(odd_names))
    assert printable(report.to_text().replace("\n", ""))
    json.dumps(report.to_dict(), ensure_ascii=False).encode("utf-8")
    assert contact_sheet(str(odd_names)).width > 100
    from lediflow.cli.app import main

    out = tmp_path / f"out-{NOT_UTF8}"
    for command in (["data", "inspect", str(odd_names), "--output", str(out)], ["data", "inspect", EVIL]):
        monkeypatch.setattr(sys, "argv", ["lediflow", *command])
        with pytest.raises(SystemExit):
            main()
        printed = "".join(capsys.readouterr())
        assert "Traceback" not in printed and printable(printed.replace("\n", "").replace("\t", ""))
    assert (out / "report.json").is_file()


def test_a_link_to_the_root_or_upwards_is_not_walked(tmp_path, monkeypatch):
    root = picture(tmp_path / "home" / "set" / "a" / "0.png").parent.parent
    picture(tmp_path / "home" / "private.png")
    try:
        (root / "everything").symlink_to("/", target_is_directory=True)
        (root / "up").symlink_to(tmp_path / "home", target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no symbolic links")
    visited, walk = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path=".": visited.append(os.fspath(path)) or walk(path))
    with pytest.warns(UserWarning, match="lead.* above .*not followed"):
        rows = open_dataset(str(root))
    assert len(rows) == 1 and len(visited) < 10


def test_a_link_into_the_same_folder_does_not_change_a_class(tmp_path):
    picture(tmp_path / "dog" / "0.png")
    picture(tmp_path / "cat" / "1.png")
    (tmp_path / "cat" / "also").symlink_to(tmp_path / "dog", target_is_directory=True)
    rows = open_dataset(str(tmp_path))
    assert [(Path(r["image"]["path"]).name, r["label"]) for r in rows] == [("1.png", 0), ("0.png", 1)]


def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path, monkeypatch):
    picture(tmp_path / "a" / "0.png")
    picture(tmp_path / "b" / "1.png")
    original = os.scandir

    def scandir(path="."):
        if os.path.basename(os.fspath(path)) == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.warns(UserWarning, match="cannot look into .*b.*Permission denied"):
        assert len(open_dataset(str(tmp_path))) == 1


@pytest.mark.parametrize(
    "name",
    ["", " ", "x" * 5000, "a\0b", "~nobody-of-this-name/x", "{0..99999999999}.tar", "{9..1}.tar", "/dev/null",
     "[", "*", "**", "a/b:", "://", "file://", "nonsense://x/y.tar", "http://[/x.parquet", "./", "../..\0",
     NOT_UTF8, EVIL, "owner/" + "x" * 300],
)  # fmt: skip
def test_arguments_that_name_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        open_dataset(name)
    assert str(caught.value)
