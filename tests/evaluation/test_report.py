from __future__ import annotations

import torch

from lediflow.evaluation.report import write_report

NAME = "<script>alert(1)</script> | a & b"


class Reference:
    """Stands in for the real images."""

    def pixels(self, indices):
        return torch.zeros(len(indices), 1, 8, 8, dtype=torch.uint8)


def test_names_are_text_in_the_page_and_cells_in_the_table(tmp_path):
    value = {"value": 2.0, "low": 1.0, "high": 3.0}
    row = {
        "model": NAME,
        "kind": "LeDiFlowPipeline",
        "solver": "midpoint",
        "steps": 2,
        "latent_solver": None,
        "latent_steps": None,
        "nfe": {"flow": 4},
        "ms_per_image": {"total": 5.0, "flow": 4.0, "other": 1.0},
        "images_per_second": 200.0,
        "metrics": {"f/mmd": value, "f/kernel": value | {"value": -1.0}},
        "closest": [{"image": 0, "training_image": 3, "distance": 0.5}],
    }
    real = {"shape": (1, 8, 8), "reference_images": 9, "floor": {"f/mmd": value}, "floor_images": 5}
    settings = {"data": "<b>", "num_images": 9, "seed": 0, "bootstrap": 3, "dtype": "fp32", "batch_size": 4}
    results = {
        "settings": settings,
        "device_name": "CPU",
        "torch": "2",
        "torch_threads": 1,
        "features": [{"name": "f", "headline": "f/mmd"}],
        "models": [{"name": NAME, "shape": (1, 8, 8)}],
        "real": [real],
        "notes": ["<i>few</i>"],
        "rows": [row],
    }
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    write_report(results, [{"first": images, "closest": images[:1]}], {(1, 8, 8): Reference()}, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.lstrip().startswith("<!doctype html>")
    assert "<script>" not in page and "<i>few" not in page
    cell = "<td>&lt;script&gt;alert(1)&lt;/script&gt; | a &amp; b</td>"
    assert page.count(cell) == 2, "in both tables, in one piece"
    assert "<p>No baseline was given.</p>" in page
    assert "<td>5 real images, 8 px</td>" in page and "<td>2 [1, 3]</td>" in page
    assert "<dt>mmd</dt>" in page and "Lower is better" in page
    plots = sorted(path.name for path in tmp_path.glob("quality-*"))
    assert plots == ["quality-f-mmd.png"], "a logarithmic axis has no place for -1"
    assert "alert(1)</script> \\| a & b |" in (tmp_path / "table.md").read_text()
