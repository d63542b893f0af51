import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import refused


def test_what_cannot_be_served_is_refused(lediflow, tmp_path):
    assert refused(lediflow("app", tmp_path / "nowhere"), "no model")
    assert refused(lediflow("app", tmp_path, "--max-pictures", 0), "--max-pictures must be at least 1, not 0")
    assert refused(lediflow("app", tmp_path, "--max-file-mb", -1), "--max-file-mb must be at least 1")
    assert refused(lediflow("app", tmp_path), "has no trained pipeline")


@pytest.mark.slow
def test_a_process_that_is_ended_leaves_nothing(tiny_run, tmp_path):
    pytest.importorskip("gradio", reason="the extra app is not installed")
    command = [sys.executable, "-m", "lediflow", "app", str(tiny_run), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_temporary(tmp_path)) as process:
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:")
        page = urllib.request.urlopen(line.split()[0], timeout=30).read()
        assert b"lediflow" in page
        (folder,) = tmp_path.glob("lediflow-app-*")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    assert not Path(folder).exists()


def _temporary(folder):
    import os

    return {**os.environ, "TMPDIR": str(folder)}
