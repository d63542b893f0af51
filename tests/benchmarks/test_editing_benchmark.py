"""What benchmarks/editing.py reports: its formulas, and every part on random networks."""

import editing
import pytest
import torch
from conftest import TINY, digits_data, random_network

from lediflow import FlowMatchingPipeline, LeDiFlowPipeline
from lediflow.training.config import load_config


def middle(side=8):
    mask = torch.zeros(1, 1, side, side, dtype=torch.bool)
    mask[..., 2:6, 2:6] = True
    return mask


def test_the_seam_is_the_step_across_the_edge_of_the_mask_alone():
    images = torch.zeros(2, 3, 8, 8)
    images[..., 2:6, 2:6] = 0.5
    assert float(editing.seam(images, middle())) == pytest.approx(0.5)
    images[..., 3:5, 3:5] = -1
    assert float(editing.seam(images, middle())) == pytest.approx(0.5)
    assert editing.crop(images, middle()).shape == (2, 3, 4, 4)
    assert editing.largest_change(images, images + 0.01, middle()[0, 0]) in (1, 2)


@pytest.mark.parametrize("part", editing.PARTS)
def test_every_part_reports_numbers(part, monkeypatch):
    monkeypatch.setattr(editing, "SOLVERS", {"euler": (1, 2, 4), "midpoint": (1, 2)})
    config = load_config("digits", TINY)
    parts = {name: random_network(config, name) for name in ("auxiliary", "flow", "sampler")}
    images = next(digits_data().in_order(8))
    rows = editing.PARTS[part](
        LeDiFlowPipeline(**parts),
        images,
        features=lambda x: x.flatten(1),
        real=images.flatten(1),
        baseline=FlowMatchingPipeline(flow=random_network(config, "baseline")),
        pairs=4,
    )
    assert len(rows) > 4
    if part == "inpainting":
        assert all(row["largest change outside"] == 0 for row in rows)
        assert len({row["way"] for row in rows}) == len(rows)
    if part == "interpolation":
        ways = [row for row in rows if "path length" in row]
        assert len(ways) == 4 and all(row["longest step / mean"] >= 1 for row in ways)
