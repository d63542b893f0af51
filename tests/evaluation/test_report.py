from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lediflow.errors import UserError
from lediflow.evaluation.report import (
    Point,
    image_grid,
    labelled_grid,
    markdown_table,
    pareto_front,
    quality_plot,
    verdict,
)

CURVES = {
    "FM": [Point(4, 4, 0.4, 3.0), Point(1, 1, 0.1, 40.0), Point(2, 2, 0.2, 12.0)],
    "LeDiFlow": [Point(1, 2, 0.15, 2.5), Point(2, 3, 0.25, 1.2), Point(4, 5, 0.45, 0.8)],
}


def test_grid_puts_each_pixel_where_it_belongs():
    images = torch.linspace(-1, 1, 5 * 2 * 3).reshape(5, 1, 2, 3)
    grid = np.asarray(image_grid(images, columns=2, scale=3, pad=4))
    assert grid.shape == (3 * (2 * 3 + 4) + 4, 2 * (3 * 3 + 4) + 4)
    expected = np.full_like(grid, 255)
    for i in range(5):
        top, left = 4 + (i // 2) * (6 + 4), 4 + (i % 2) * (9 + 4)
        pixels = np.rint((images[i, 0].numpy() + 1) * 127.5)
        expected[top : top + 6, left : left + 9] = np.kron(pixels, np.ones((3, 3)))
    np.testing.assert_array_equal(grid, expected)


def test_grid_of_colours_without_padding():
    images = torch.full((2, 3, 1, 1), -1.0)
    images[0, 0] = 1
    images[1, 2] = 1
    grid = image_grid(images, columns=2, pad=0)
    assert grid.mode == "RGB"
    assert np.asarray(grid).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_values_outside_the_range():
    images = torch.tensor([-7.0, 7.0, float("nan"), 0.0]).reshape(4, 1, 1, 1)
    assert np.asarray(image_grid(images, columns=4, pad=0)).tolist() == [[0, 255, 0, 128]]


def test_default_columns_and_rows_of_different_kinds():
    assert image_grid(torch.zeros(7, 1, 4, 4), pad=0).size == (3 * 4, 3 * 4)
    rows = [torch.zeros(2, 1, 4, 4), torch.ones(5, 3, 4, 4)]
    mixed = image_grid(rows, pad=0)
    assert (mixed.size, mixed.mode) == ((5 * 4, 2 * 4), "RGB")
    assert np.asarray(mixed)[0, 0].tolist() == [128] * 3
    assert image_grid(rows, columns=3, pad=0).size == (3 * 4, 3 * 4)


def test_images_that_carry_gradients_are_shown_and_left_alone():
    images = torch.zeros(1, 1, 2, 2, requires_grad=True)
    image_grid(images)
    assert images.requires_grad


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "nothing"),
        (torch.zeros(1, 2, 4, 4), {}, "C 1 or 3"),
        (torch.zeros(1, 4, 4), {}, "N, C, H, W"),
        (torch.zeros(0, 1, 4, 4), {}, "at least 1"),
        ([torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 8, 8)], {}, "same height"),
        (torch.zeros(1, 1, 4, 4), {"scale": 0}, "scale"),
        (torch.zeros(1, 1, 4, 4), {"columns": 0}, "columns"),
    ],
)
def test_grids_that_cannot_be(rows, options, message):
    with pytest.raises(UserError, match=message):
        image_grid(rows, **options)


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


def test_vector_plot_says_the_same_each_time(tmp_path):
    texts = [
        quality_plot(CURVES, tmp_path / name, floor=0.6, metric="Fréchet distance").read_text()
        for name in ("first.svg", "second.svg")
    ]
    assert texts[0].startswith("<?xml")
    assert texts[0] == texts[1]


def test_plot_leaves_pyplot_and_the_settings_alone(tmp_path):
    import sys

    import matplotlib

    before = dict(matplotlib.rcParams)
    quality_plot(CURVES, tmp_path / "plot.svg", floor=None, metric="FD")
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize(
    ("curves", "name", "floor", "message"),
    [
        (CURVES, "plot.jpg", None, "written as"),
        ({}, "plot.png", None, "curves"),
        ({"FM": []}, "plot.png", None, "curves"),
        ({str(i): CURVES["FM"] for i in range(7)}, "plot.png", None, "1 to 6"),
        ({"FM": [Point(1, 1, 0.1, 0.0)]}, "plot.png", None, "above 0"),
        ({"FM": [Point(1, 1, 0.1, float("nan"))]}, "plot.png", None, "above 0"),
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


def test_table_is_aligned():
    table = markdown_table(["model", "steps", "FD"], [["FM", 1, "41.0"], ["a|b", 16, "0.8"]])
    assert table.splitlines() == [
        "| model | steps |   FD |",
        "| ----- | ----: | ---: |",
        "| FM    |     1 | 41.0 |",
        "| a\\|b  |    16 |  0.8 |",
    ]


def test_table_without_rows_and_with_a_short_row():
    assert markdown_table(["a", "b"], []) == "| a   | b   |\n| --- | --- |"
    with pytest.raises(ValueError, match="2 cells"):
        markdown_table(["a", "b"], [["only one"]])


def test_pareto_front_holds_what_nothing_beats():
    fast, good, both = Point(1, 1, 1.0, 9.0), Point(8, 8, 8.0, 1.0), Point(2, 2, 2.0, 2.0)
    beaten = [Point(4, 4, 4.0, 2.5), Point(3, 3, 8.0, 3.0), Point(1, 1, 1.0, 9.5)]
    assert pareto_front([good, *beaten, both, fast]) == [fast, both, good]


def test_verdict_names_the_fastest_that_is_as_good_as_the_baselines_best():
    baseline = [Point(1, 2, 1.0, 9.0), Point(8, 16, 8.0, 3.0)]
    says = verdict([Point(1, 7, 1.5, 4.0), Point(2, 9, 2.0, 2.5), Point(4, 13, 4.0, 2.0)], baseline)
    assert says.startswith("LeDiFlow with 2 steps (2.5)")
    assert "in 2.00 instead of 8.00 ms per image: 4.0 times the speed" in says
    assert "does not reach the best of flow matching (3 at 8 steps)" in verdict(
        [Point(1, 7, 1.5, 4.0)], baseline
    )


def test_verdict_names_a_cheaper_baseline_that_is_as_good_for_all_one_knows():
    ours = [Point(1, 7, 2.0, 1.0)]
    baseline = [Point(2, 4, 3.0, 2.2, 1.9, 2.5), Point(8, 16, 8.0, 2.0, 1.7, 2.3)]
    assert "within the interval of its best already with 2 steps (2.2) in 3.00 ms" in verdict(ours, baseline)
    apart = [Point(2, 4, 3.0, 2.4, 2.1, 2.7), baseline[1]]
    assert "interval" not in verdict(ours, apart)


def test_intervals_are_drawn_and_may_reach_zero(tmp_path):
    plain = {"FM": [Point(1, 1, 0.1, 1.0), Point(2, 2, 0.2, 0.5)]}
    marked = {"FM": [Point(1, 1, 0.1, 1.0, 0.7, 1.2), Point(2, 2, 0.2, 0.5, 0.0, 0.6)]}
    texts = [
        quality_plot(curves, tmp_path / f"{i}.svg", floor=None, metric="FD").read_text()
        for i, curves in enumerate((plain, marked))
    ]
    assert texts[1].count('<g id="line2d') > texts[0].count('<g id="line2d')
