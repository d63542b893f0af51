"""Tiles: weights that sum to 1, and a field of tiles against the field of the whole."""

import itertools
import weakref

import pytest
import torch
from torch.nn import functional

from lediflow import ode
from lediflow.errors import UserError
from lediflow.fields import Field
from lediflow.tiles import blended, tiled, windows


@pytest.mark.parametrize("size", [(8, 8), (16, 40), (24, 17 * 4), (20, 100)])
@pytest.mark.parametrize(("tile", "overlap"), [(16, 4), (16, 8), (12, 4)])
def test_tiles_cover_the_image_with_weights_that_sum_to_1(size, tile, overlap):
    tiles = windows(size, tile, overlap, 4)
    total, smallest = torch.zeros(size), 1.0
    for one in tiles:
        weights = one.weights[0] * one.weights[1]
        assert weights.shape == one.of(total).shape == (min(size[0], tile), min(size[1], tile))
        assert one.rows.start % 4 == one.columns.start % 4 == 0
        one.of(total).add_(weights)
        smallest = min(smallest, float(weights.min()))
    torch.testing.assert_close(total, torch.ones(size))
    assert smallest >= 0
    for axis, side in enumerate(size):
        spans = sorted({((t.rows, t.columns)[axis].start, (t.rows, t.columns)[axis].stop) for t in tiles})
        assert spans[0][0] == 0 and spans[-1][1] == side
        assert all(a[1] - b[0] >= overlap for a, b in itertools.pairwise(spans)), "neighbours overlap enough"


def field_of_convolution(kernel):
    """A local field: each pixel's velocity depends on those next to it."""
    radius = kernel.shape[-1] // 2

    def of(t, state, r):
        return functional.conv2d(functional.pad(state, (radius,) * 4), kernel) * (1 + t)

    return Field(of, rows=lambda index: field_of_convolution(kernel))


def test_a_local_field_in_tiles_is_that_of_the_whole():
    """What a tile's rim lacks is not used: the outer quarter of an overlap."""
    x = torch.randn(2, 1, 40, 56)
    field = field_of_convolution(torch.randn(1, 1, 5, 5))  # reaches two pixels: a quarter of the overlap
    tiles = windows((40, 56), 16, 8)
    of_tiles = tiled(lambda tile: field, tiles)
    t = torch.tensor(0.3)
    torch.testing.assert_close(of_tiles(t, x), field(t, x), rtol=1e-5, atol=1e-5)
    assert of_tiles.evaluations == len(tiles) == 4 * 6
    whole = ode.integrate(field, x, solver="midpoint", steps=2)
    parts = ode.integrate(of_tiles, x, solver="midpoint", steps=2)
    torch.testing.assert_close(parts.end, whole.end, rtol=1e-4, atol=1e-4)
    assert parts.nfe == 24 * whole.nfe
    cut = tiled(lambda tile: field, windows((40, 56), 16, 4))  # where a quarter is less than the reach
    assert (cut(t, x) - field(t, x)).abs().max() > 1e-3


def test_the_seam_of_tiles_that_disagree_is_a_smooth_passage():
    """The field of a tile is its own mean: between neighbours it changes by small steps, not at once."""
    x = torch.linspace(-1, 1, 64).expand(1, 1, 16, 64)
    own_mean = Field(lambda t, s, r: s.mean((2, 3), keepdim=True).expand_as(s), rows=lambda i: own_mean)
    tiles = windows((16, 64), 16, 8)
    velocity = tiled(lambda tile: own_mean, tiles)(torch.tensor(0.0), x)[0, 0, 0]
    means = [float(tile.of(x).mean()) for tile in tiles]
    jump = means[1] - means[0]
    assert velocity.diff().min() >= -1e-6, "from mean to mean, never back"
    assert float(velocity.diff().max()) < 0.4 * jump, "a cut would be the whole jump at one place"
    assert velocity[0] == pytest.approx(means[0]) and velocity[-1] == pytest.approx(means[-1])


def test_one_tile_is_the_field_itself():
    field = field_of_convolution(torch.ones(1, 1, 3, 3))
    assert tiled(lambda tile: field, windows((8, 12), 12, 0)) is field


def test_images_are_integrated_one_by_one_in_tiles_too():
    pull = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)

    def of(rows):
        return Field(lambda t, s, r: -pull[rows] * s, rows=lambda index: of(index))

    x = torch.ones(2, 1, 8, 12)
    out = ode.integrate(tiled(lambda tile: of([0, 1]), windows((8, 12), 8, 4)), x, solver="dopri5")
    torch.testing.assert_close(out.end, x * (-pull).exp(), rtol=1e-4, atol=1e-4)


def test_memory_holds_one_answer_at_a_time():
    handed = []

    def answers():
        for _ in range(4):
            assert sum(one() is not None for one in handed) <= 1
            answer = torch.ones(1, 1, 8, 8)
            handed.append(weakref.ref(answer))
            yield answer
            del answer

    whole = blended(answers(), windows((12, 12), 8, 4), (12, 12))
    torch.testing.assert_close(whole, torch.ones(1, 1, 12, 12))


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [(10, 4, "multiples of 4"), (16, 3, "multiples of 4"), (16, 0, "must be from 4 to 8"), (16, 12, "to 8")],
)
def test_tiles_that_cannot_be_are_refused(tile, overlap, message):
    with pytest.raises(UserError, match=message):
        windows((32, 32), tile, overlap, 4)
