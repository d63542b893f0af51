from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from lediflow.evaluation.ranks import from_first, in_batches, is_first, join_launch

TWO = """
import sys, torch
from lediflow.evaluation.ranks import from_first, in_batches, is_first, join_launch
assert join_launch("cpu").type == "cpu"
seen = []
def make(batch):
    seen.append(list(batch))
    return [torch.tensor(batch), 2.0 * torch.tensor(batch)[:, None]]
indices, doubled = in_batches(10, 3, make)
assert indices.tolist() == list(range(10)) and doubled.flatten().tolist() == [2.0 * i for i in range(10)]
rank = torch.distributed.get_rank()
assert seen == ([[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9]])[rank], seen
assert from_first(lambda: {"rank": rank}) == {"rank": 0}
assert is_first() == (rank == 0)
sys.stdout.write(f"done {rank};")
torch.distributed.destroy_process_group()
"""


def test_one_process_is_its_plain_self(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_launch("cpu") is None
    assert is_first()
    assert from_first(lambda: 3) == 3
    (found,) = in_batches(7, 3, lambda batch: [torch.tensor(batch)])
    assert found.tolist() == list(range(7))


def test_two_processes_have_what_one_has(tmp_path: Path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command += ["--standalone", str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "done 0;" in result.stdout
    assert "done 1;" in result.stdout
