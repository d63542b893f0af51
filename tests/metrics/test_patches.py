"""Random squares of images."""

import pytest
import torch

from lediflow.errors import UserError
from lediflow.metrics.patches import random_squares


def test_squares_lie_in_their_image_at_places_of_their_own():
    images = torch.arange(2 * 3 * 8 * 9).view(2, 3, 8, 9).float()
    found = random_squares(images, 4, 50, seed=1)
    assert found.shape == (100, 3, 4, 4)
    corners = [
        (divmod(int(square[0, 0, 0]) - offset, 9))
        for offset, part in ((0, found[:50]), (216, found[50:]))
        for square in part
    ]
    assert {top for top, _ in corners} == set(range(5)) and {left for _, left in corners} == set(range(6))
    top, left = corners[0]
    assert torch.equal(found[0], images[0, :, top : top + 4, left : left + 4])
    assert torch.equal(random_squares(images[1:], 4, 50, seed=1, first=1), found[50:])
    assert corners[:50] != corners[50:]
    assert not torch.equal(random_squares(images, 4, 50, seed=2), found)
    with pytest.raises(UserError, match="squares of 9 px do not fit in images of 8x9"):
        random_squares(images, 9, 1)
