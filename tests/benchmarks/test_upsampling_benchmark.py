"""What benchmarks/upsampling.py says of tiles; how fast anything is, is not asserted."""

from types import SimpleNamespace

import torch
import upsampling
from toy_upsampler import TOLD, Told, transformer

from lediflow.networks.hourglass import SelfAttention
from lediflow.pipelines.upsample import FlowUpsamplePipeline


def rows(capsys, monkeypatch, network):
    pipeline = FlowUpsamplePipeline(network, scale=2, noise_level=200)
    monkeypatch.setattr(upsampling, "load_upsampler", lambda run: pipeline)
    asked = SimpleNamespace(run="", device=None, data="digits", side=16, count=2, steps=1, tiles=[16])
    upsampling.measure_seams(asked)
    cells = [line.strip("| ").split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    return [[float(cell) for cell in row] for row in cells if len(row) == 4]


def test_tiles_of_a_network_that_looks_at_one_pixel_leave_no_seam(capsys, monkeypatch):
    (small,) = rows(capsys, monkeypatch, Told(conditions=TOLD))
    assert small[:2] == [16, 9] and small[2] < 1e-6 and abs(small[3] - 1) < 1e-3


def test_tiles_of_a_network_that_looks_further_differ(capsys, monkeypatch):
    network = transformer(any_size=True)
    for block in network.hourglass.modules():
        if isinstance(block, SelfAttention):  # starts as zero
            torch.nn.init.normal_(block.out.weight)
    (small,) = rows(capsys, monkeypatch, network)
    assert small[2] > 1e-4
