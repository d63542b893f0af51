"""Large images piece by piece: overlapping tiles whose answers are averaged with smooth weights.

A field of tiles is averaged at every evaluation (MultiDiffusion, arXiv 2302.08113), so neighbours agree all
along the path, and memory is that of one tile whatever the image's size. At the rim of a tile its network
lacks context: the outer quarter of an overlap is seen and not used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lediflow.errors import UserError
from lediflow.fields import Field


@dataclass(frozen=True)
class Window:
    """One tile: its place in (H, W), and the weights of its pixels, the product of (h, 1) and (1, w)."""

    rows: slice
    columns: slice
    weights: tuple[Tensor, Tensor]

    def of(self, x: Tensor) -> Tensor:
        """Return the tile's part (..., h, w) of x (..., H, W), a view."""
        return x[..., self.rows, self.columns]


def windows(size: tuple[int, int], tile: int, overlap: int, multiple: int = 1) -> list[Window]:
    """Return the tiles that cover an image; their weights sum to 1 at every pixel.

    All have the same size: `tile` along a side that is longer than that, otherwise the whole side.

    Args:
        size: (H, W) of the image, multiples of `multiple`.
        tile: side of a tile.
        overlap: of neighbours, at most half of a tile; as tiles are spread evenly, it may become more.
        multiple: places of tiles are multiples of this, so that a network's patches lie as in the whole.

    Raises:
        UserError: tile or overlap is no multiple of `multiple`, or they do not fit each other.
    """
    if max(size) > tile:
        if tile % multiple or overlap % multiple:
            raise UserError(f"tiles of {tile} with overlap {overlap}: both must be multiples of {multiple}")
        if not 0 < overlap <= tile // 2:
            raise UserError(
                f"the overlap of tiles of {tile} must be from {multiple} to {tile // 2}, not {overlap}"
            )
    down, across = (_spans(side, tile, overlap, multiple) for side in size)
    return [
        Window(rows, columns, (of_rows[:, None], of_columns[None, :]))
        for (rows, of_rows), (columns, of_columns) in itertools.product(down, across)
    ]


def blended(answers: Iterable[Tensor], tiles: Sequence[Window], size: Sequence[int]) -> Tensor:
    """Return the weighted mean (B, C, *size) of tiles, each (B, C, h, w).

    Of the answers, one at a time is asked for.
    """
    whole = None
    for answer, tile in zip(answers, tiles, strict=True):
        if len(tiles) == 1:
            return answer
        if whole is None:
            whole = answer.new_zeros(*answer.shape[:-2], *size)
        rows, columns = (weights.to(whole) for weights in tile.weights)
        tile.of(whole).addcmul_(answer * rows, columns)
    assert whole is not None, "an image has at least one tile"
    return whole


def tiled(field_of: Callable[[Window], Field], tiles: Sequence[Window]) -> Field:
    """Return the field of a large image that is the mean of its tiles' fields.

    Args:
        field_of: gives the field of a tile, with the tile's part of all conditions.
        tiles: see `windows`; of one tile the field is its own.
    """
    fields = [field_of(tile) for tile in tiles]
    if len(fields) == 1:
        return fields[0]

    def at(t: Tensor, state: Tensor, r: Tensor | None) -> Tensor:
        return blended(
            (field(t, tile.of(state), r) for field, tile in zip(fields, tiles, strict=True)),
            tiles,
            state.shape[-2:],
        )

    return Field(
        at,
        rows=lambda index: tiled(lambda tile: field_of(tile).rows(index), tiles),
        evaluations=sum(field.evaluations for field in fields),
    )


def _spans(side: int, tile: int, overlap: int, multiple: int) -> list[tuple[slice, Tensor]]:
    """Return the places of the tiles along one side, and their weights there."""
    if side <= tile:
        return [(slice(0, side), torch.ones(side))]
    count = -(-(side - overlap) // (tile - overlap))
    starts = [round(i * (side - tile) / (count - 1) / multiple) * multiple for i in range(count)]
    places = torch.arange(side) + 0.5
    share = [torch.ones(side)]  # of tile i and all after it
    for before, start in itertools.pairwise(starts):
        end = before + tile
        # smooth over the middle half of the overlap, 0 or 1 in its outer quarters
        ramp = ((places - start) / (end - start) * 2 - 0.5).clamp(0, 1)
        share.append(ramp * ramp * (3 - 2 * ramp))
    share.append(torch.zeros(side))
    # a telescope: weights sum to 1 even where three tiles meet
    spans = [slice(start, start + tile) for start in starts]
    return [
        (span, (mine - later)[span])
        for span, (mine, later) in zip(spans, itertools.pairwise(share), strict=True)
    ]
