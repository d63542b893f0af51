from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lediflow.errors import UserError
from lediflow.evaluation.plots import Point, labelled_grid, pareto_front, quality_plot
from lediflow.pictures import image_grid

CURVES = {
    "FM": [Point(4, 0.4, 3.0), Point(1, 0.1, 40.0), Point(2, 0.2, 12.0)],
    "LeDiFlow": [Point(1, 0.15, 2.5), Point(2, 0.25, 1.2), Point(4, 0.45, 0.8)],
}


@pytest.mark.parametrize("title", [None, "A title that is wider than the few images below it, by far"])
def test_labelled_grid_holds_the_grid_and_its_labels(tmp_path, title):
    rows = {"real": torch.zeros(3, 1, 16, 16), "LeDiFlow, 1 step\n(2 evaluations)": -torch.ones(3, 3, 16, 16)}
    path = labelled_grid(rows, tmp_path / "new" / "grid.png", scale=4, title=title)
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    grid = np.asarray(image_grid(list(rows.values()), scale=4, pad=2)).astype(int)
    inner = grid[2:-2, 2:-2]
    found = [
        (y, x)
        for y in range(pixels.shape[0] - inner.shape[0] + 1)
        for x in range(pixels.shape[1] - inner.shape[1] + 1)
        if (pixels[y, x] == inner[0, 0]).all()
        and (pixels[y : y + inner.shape[0], x : x + inner.shape[1]] == inner).all()
    ]
    assert len(found) == 1
    top, left = found[0]
    for row in range(2):
        label = pixels[top + row * 66 : top + row * 66 + 64, :left]
        assert label.min() < 100, "the row has no label"
        assert label[:, -8:].min() == 255, "the label runs into the images"
    assert (pixels[:top].min() < 100) == (title is not None)
    assert pixels[:, -6:].min() == 255, "something is cut off at the right"


@pytest.mark.parametrize("floor", [0.6, None])
def test_plot_is_written(tmp_path, floor):
    path = quality_plot(CURVES, tmp_path / "plot.png", floor=floor, metric="Fréchet distance")
    with Image.open(path) as picture:
        assert picture.width > 1000
        assert 0.3 < picture.height / picture.width < 0.7
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_plot_leaves_pyplot_and_the_settings_alone(tmp_path):
    import sys

    import matplotlib

    before = dict(matplotlib.rcParams)
    quality_plot(CURVES, tmp_path / "plot.png", floor=None, metric="FD")
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize(
    ("curves", "name", "floor", "message"),
    [
        ({}, "plot.png", None, "curves"),
        ({"FM": []}, "plot.png", None, "curves"),
        ({str(i): CURVES["FM"] for i in range(7)}, "plot.png", None, "1 to 6"),
        ({"FM": [Point(1, 0.1, 0.0)]}, "plot.png", None, "above 0"),
        ({"FM": [Point(1, 0.1, float("nan"))]}, "plot.png", None, "above 0"),
        (CURVES, "plot.png", 0.0, "above 0"),
    ],
)
def test_plots_that_cannot_be(tmp_path, curves, name, floor, message):
    with pytest.raises(UserError, match=message):
        quality_plot(curves, tmp_path / name, floor=floor, metric="FD")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def half(self, path, *args, **kwargs):
        with open(path, "w") as file:
            file.write("half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half)
    monkeypatch.setattr(Figure, "savefig", half)
    path = tmp_path / "old.png"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"):
        labelled_grid({"real": torch.zeros(1, 1, 8, 8)}, path)
    with pytest.raises(OSError, match="disk full"):
        quality_plot(CURVES, path, floor=None, metric="FD")
    assert [p.name for p in tmp_path.iterdir()] == ["old.png"]
    assert path.read_text() == "old"


def test_labelled_grid_refuses_an_unknown_format(tmp_path):
    with pytest.raises(UserError, match=r"\.png"):
        labelled_grid({"real": torch.zeros(1, 1, 8, 8)}, tmp_path / "grid.xyz")


def test_intervals_are_drawn_and_may_reach_zero(tmp_path):
    plain = [Point(1, 0.1, 1.0), Point(2, 0.2, 0.5)]
    marked = [Point(1, 0.1, 1.0, 0.7, 1.2), Point(2, 0.2, 0.5, 0.0, 0.6)]

    def inked(name, curve):
        path = quality_plot({"FM": curve}, tmp_path / name, floor=None, metric="FD")
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        return (np.abs(pixels - (0x00, 0x72, 0xB2)).sum(-1) < 40).sum()

    assert inked("marked.png", marked) > inked("plain.png", plain) + 100


def test_pareto_front_holds_what_nothing_beats():
    fast, good, both = Point(1, 1.0, 9.0), Point(8, 8.0, 1.0), Point(2, 2.0, 2.0)
    beaten = [Point(4, 4.0, 2.5), Point(3, 8.0, 3.0), Point(1, 1.0, 9.5)]
    assert pareto_front([good, *beaten, both, fast]) == [fast, both, good]
