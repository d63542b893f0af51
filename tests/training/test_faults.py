"""Real commands killed with SIGKILL, every second time amid writing: nothing is lost, the ends are the same.

`benchmarks/faults.py` does the same with 200 kills.
"""

import random
import sys

import pytest
from conftest import ROOT, SEED


@pytest.fixture(scope="module")
def faults():
    """The script as a module that the processes it starts can import too."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import faults

    yield faults
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.slow
def test_killed_commands_end_as_the_undisturbed_ones(faults, tmp_path, monkeypatch):
    few = [setting.replace("pairs=2048", "pairs=512") for setting in faults.TINY]
    monkeypatch.setattr(faults, "TINY", few)
    commands = ("train", "encode", "sample")  # the script itself does the others too, which take longer
    faults.prepare(tmp_path / "source", commands, tmp_path / "log.txt")
    for command in commands:
        random.seed(f"{SEED} {command}")
        done = faults.torture(tmp_path / "source", tmp_path / command, command, kills=1, steps=3)
        assert done.kills == 1 and done.ends >= 1


def test_what_is_lost_or_half_written_or_made_again_is_found(faults, tmp_path):
    """The checks themselves: a script that finds nothing is of no use."""
    case = faults.case_of("encode", tmp_path, 6)
    output = tmp_path / "out"
    output.mkdir()
    (output / "a.json").write_text("{}")
    faults.check_whole(output)
    (output / "a.json").write_text('{"half')
    with pytest.raises(AssertionError, match="a.json is not whole"):
        faults.check_whole(output)
    (output / "a.json").unlink()
    (output / ".a.json").write_text("half")
    assert faults.half_written(output) == [f"{output}/.a.json"]
    with pytest.raises(AssertionError, match="left half-written"):
        faults.check_end({}, {}, output)
    with pytest.raises(AssertionError, match="differ .*'b'"):
        faults.check_end({"a": 1, "b": 1}, {"a": 1, "b": 2}, output)
    with pytest.raises(AssertionError, match="shard is lost"):
        faults.kept_of(case, output, {"shard": ("digest", 1)})
    (output / "run" / "checkpoints" / "step-3").mkdir(parents=True)
    (output / "run" / "checkpoints" / "step-3" / "state.json").write_text('{"step": 3}')
    with pytest.raises(AssertionError, match="fell from 6 to 3"):
        faults.kept_of(faults.case_of("train", tmp_path, 6), output, {"run": 6})
    log = '{"step": 7, "loss": 1, "learning_rate": 1}\n{"step": 8, "lo'
    (output / "run" / "metrics.jsonl").write_text(log)
    with pytest.raises(AssertionError, match="more than 3 steps lost"):
        faults.newest_checkpoints(output)
