"""Files that are whole or not there, and what killed processes leave."""

import pytest

from lediflow.errors import UserError
from lediflow.files import clear_unfinished, remove_folder, write_folder, write_text, written_whole


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
