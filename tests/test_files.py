"""Files that are whole or not there, and what killed processes leave."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from lediflow import files
from lediflow.errors import UserError
from lediflow.files import (
    check_output,
    claim_folder,
    clear_files,
    clear_unfinished,
    remove_folder,
    shown,
    write_folder,
    write_text,
    written_whole,
)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), written_whole(tmp_path / "a.txt") as path:
        path.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_whole_or_as_it_was(tmp_path):
    target = tmp_path / "folder"
    write_folder(target, lambda f: (f / "a").write_text("old"))

    def fail(folder):
        (folder / "a").write_text("new")
        raise OSError(30, "Read-only file system")

    with pytest.raises(UserError, match="cannot write .*folder: .*Read-only file system"):
        write_folder(target, fail)
    assert (target / "a").read_text() == "old"
    write_folder(target, lambda f: (f / "b").write_text("new"))
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_what_killed_processes_leave_is_cleared(tmp_path):
    """Killed while writing, between the two renames, while deleting, and while writing a file."""
    for name in (".step-3.new", ".step-1.old", ".step-2.old", ".step-0.gone", "step-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    (tmp_path / f".preview-{'0' * 32}.png").write_text("half")
    (tmp_path / ".gitignore").write_text("*")
    clear_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".gitignore", "step-1", "step-2"]
    assert (tmp_path / "step-1" / "x").read_text() == ".step-1.old", "it was about to be replaced"
    assert (tmp_path / "step-2" / "x").read_text() == "step-2"


def test_removed_folders_are_gone(tmp_path):
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "x").write_text("x")
    remove_folder(tmp_path / "step-1")
    assert not list(tmp_path.iterdir())


# Killed between every two steps

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def killed_at_line(count: int, work) -> bool:
    """Run `work` in a child that dies, as from SIGKILL, before the n-th line of files.py; whether it did."""
    child = os.fork()
    if child == 0:
        left = count

        def trace(frame, event, _):
            nonlocal left
            if frame.f_code.co_filename != files.__file__:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os._exit(9)
            return trace

        sys.settrace(trace)
        try:
            work()
        finally:
            sys.settrace(None)
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def two_files(text: str):
    def fill(folder):
        (folder / "a").write_text(text)
        (folder / "b").write_text(text)

    return fill


def content(folder) -> str:
    """What both files say; fails where they differ or one is missing."""
    a, b = ((folder / name).read_text() for name in "ab")
    assert a == b
    return a


@needs_fork
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_folder_killed_between_any_two_steps_is_the_old_or_the_new_one(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    elif not sys.platform.startswith("linux"):
        pytest.skip("no exchange of names here")
    target = tmp_path / "pipeline"
    write_folder(target, two_files("0"))
    seen, missing = set(), 0
    for line in range(1, 500):
        before = content(files.readable_folder(target))
        if not killed_at_line(line, lambda n=line: write_folder(target, two_files(str(n)))):
            break
        missing += not target.exists()
        now = content(files.readable_folder(target))
        assert now in (before, str(line))
        seen.add(now == before)
        if line % 2:  # the next start
            clear_unfinished(tmp_path)
            assert [p.name for p in tmp_path.iterdir()] == ["pipeline"] and content(target) == now
    else:
        pytest.fail("never came to an end")
    assert line > 30 and seen == {True, False}
    assert content(target) == str(line) and [p.name for p in tmp_path.iterdir()] == ["pipeline"]
    assert exchange != bool(missing), "only two renames leave a moment without"


@needs_fork
def test_removal_killed_between_any_two_steps_can_be_done_again(tmp_path):
    for line in range(1, 50):
        for name in ("step-1", "step-2"):
            (tmp_path / name).mkdir(exist_ok=True)
            two_files("x")(tmp_path / name)
        killed = killed_at_line(line, lambda: remove_folder(tmp_path / "step-1"))
        if (tmp_path / "step-1").exists():
            assert content(tmp_path / "step-1") == "x"
        else:
            (tmp_path / "step-1").mkdir()
            two_files("y")(tmp_path / "step-1")
        remove_folder(tmp_path / "step-1")  # made again after the kill, and removed again
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step-2"]
        if not killed:
            return
    pytest.fail("never came to an end")


def test_a_failing_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "pipeline"
    write_folder(target, two_files("old"))
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    rename = Path.rename

    def failing(self, new):
        if self.name == ".pipeline.new":
            raise OSError(28, "No space left on device")
        return rename(self, new)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UserError, match="No space left"):
        write_folder(target, two_files("new"))
    assert content(target) == "old" and [p.name for p in tmp_path.iterdir()] == ["pipeline"]


def test_a_link_in_place_of_the_folder_is_replaced_and_what_it_led_to_is_kept(tmp_path):
    two_files("elsewhere")((tmp_path / "elsewhere").mkdir() or tmp_path / "elsewhere")
    target = tmp_path / "pipeline"
    target.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    for text in ("1", "2"):
        write_folder(target, two_files(text))
        assert content(target) == text and content(tmp_path / "elsewhere") == "elsewhere"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "pipeline"]


def test_other_people_s_hidden_files_are_left_alone(tmp_path):
    for name in (".bashrc.old", ".notes.new", ".gitignore"):
        (tmp_path / name).write_text(name)
    clear_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".bashrc.old", ".gitignore", ".notes.new"]


# Before hours of work


def test_only_files_of_killed_processes_are_cleared(tmp_path):
    names = [f".a-{'0' * 32}.json", f".a-b-{'1' * 32}.json", f".b-{'0' * 32}.json", ".a-mine.json", "a.json"]
    for name in names:
        (tmp_path / name).write_text("")
    os.utime(tmp_path / names[2], (0, 0))
    clear_files(tmp_path, older_than=3600)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names[:2], *names[3:]])
    clear_files(tmp_path, of=tmp_path / "a-b.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([names[0], *names[3:]])
    clear_files(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[3:])


def test_a_folder_belongs_to_one_request(tmp_path):
    out, found = tmp_path / "out", {"a": 1, "models": ["x", "y"], "none": None}

    def claim(request, **options):
        claim_folder(out, request, lambda folder: folder.glob("*.png"), called="images", **options)

    claim(found)
    claim({"a": 2})
    claim(found)
    assert json.loads((out / "request.json").read_text()) == found, "with no results it is anybody's"
    (out / "0.png").write_text("")
    claim(found)
    for request, difference in (
        (found | {"a": 2}, "a: 1 there, 2 now"),
        (found | {"models": ["x", "z"]}, "models: y there, z now"),
        (found | {"models": ["x"]}, "models: y there, nothing more now"),
        (found | {"models": ["y", "x"]}, "models: x, y there, y, x now"),
        (found | {"new": 3}, "new: None there, 3 now"),
        ({"a": 1, "none": None}, "models: .* there, None now"),
    ):
        with pytest.raises(UserError, match=rf"out holds images of another request \({difference}\); give"):
            claim(request)
    assert (out / "0.png").exists() and json.loads((out / "request.json").read_text()) == found
    claim({"a": 2}, overwrite=True)
    assert [p.name for p in out.iterdir()] == ["request.json"]
    (out / "0.png").write_text("")
    (out / "request.json").write_text("{half")
    with pytest.raises(UserError, match="its request.json is missing or damaged"):
        claim(found)


def test_an_output_that_can_be_written_is_made_and_left_empty(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / f".probe-{'0' * 32}").write_text("left by a killed process")
    check_output(tmp_path / "a" / "b")
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "b"]
    assert not list((tmp_path / "a" / "b").iterdir())


def test_an_output_that_cannot_be_written_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file.*choose another --output"):
        check_output(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        check_output(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="cannot write"):
        check_output(tmp_path / ("x" * 300))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        check_output(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no file system here that nobody can write to")
def test_a_read_only_output_is_refused_by_name():
    with pytest.raises(UserError, match=r"cannot write /proc/lediflow"):
        check_output(Path("/proc/lediflow"))


def test_texts_are_shown_without_what_a_terminal_would_obey():
    assert shown("a\x1b[31mb\x07\r\n\u202e\x9b") == r"a\x1b[31mb\x07\r\n\u202e\x9b"
    assert shown(os.fsdecode(b"caf\xe9")) == r"caf\xe9"
    assert shown(Path("日本 語/é’s (1).png")) == "日本 語/é’s (1).png"
    assert shown("می\u200cخواهم 👩\u200d🚀") == "می\u200cخواهم 👩\u200d🚀"


@needs_fork
def test_a_run_killed_between_the_two_renames_still_loads(tiny_run, tmp_path, monkeypatch):
    from lediflow.pipelines.load import load_pipeline

    run = tmp_path / "run"
    shutil.copytree(tiny_run / "pipeline", run / "pipeline")
    (run / "pipeline").rename(run / ".pipeline.old")
    assert load_pipeline(run).config
    files.settle(run / "pipeline")
    assert (run / "pipeline" / "model_index.json").is_file() and not (run / ".pipeline.old").exists()
