"""A real training process killed with SIGKILL, amid a checkpoint too: nothing is lost.

`benchmarks/faults.py` does the same with 20 kills over all stages.
"""

import importlib.util
import sys

from conftest import ROOT


def test_killed_runs_end_as_the_undisturbed_one(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("faults", ROOT / "benchmarks" / "faults.py")
    faults = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "faults", faults)  # dataclasses look it up
    spec.loader.exec_module(faults)
    kills = faults.torture(tmp_path, kills=2, stages=["baseline"], steps=40)
    assert len(kills) == 2
    assert all(0 < kill.step <= 40 for kill in kills)
