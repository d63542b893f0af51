from __future__ import annotations

import numpy as np
import pytest
import torch

from lediflow.errors import UserError
from lediflow.pictures import image_grid


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
