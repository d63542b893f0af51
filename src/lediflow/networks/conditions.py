"""The conditions of a network, each with its embedder (see `networks.embedders`).

A network's config names its conditions and how each is embedded, as in

    {"label": {"embedder": "class", "classes": 10}, "z": {"embedder": "grid", "channels": 4, "size": 8}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lediflow.conditions import Conditions
from lediflow.errors import UserError, nearest
from lediflow.networks.embedders import (
    CharactersEmbedder,
    ClassEmbedder,
    EncodedEmbedder,
    FlatEmbedder,
    GridEmbedder,
    NumbersEmbedder,
    RangeEmbedder,
    ScalarEmbedder,
)
from lediflow.networks.hourglass import Words, pair

EMBEDDERS: dict[str, Any] = {
    "class": ClassEmbedder,
    "scalar": ScalarEmbedder,
    "range": RangeEmbedder,
    "numbers": NumbersEmbedder,
    "flat": FlatEmbedder,
    "grid": GridEmbedder,
    "characters": CharactersEmbedder,
    "encoded": EncodedEmbedder,
}


class ConditionEmbedders(nn.ModuleDict):
    """The embedders of a network, by the names of its conditions.

    Args:
        settings: for each condition the embedder's name under "embedder", and its arguments.
        width: of the vectors.
        grid: of tokens, at the size that the network is built for.

    Raises:
        UserError: an unknown embedder, or a grid that does not fit.
    """

    def __init__(self, settings: Mapping[str, Mapping[str, Any]], width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        # a config that is read back has them in another order than the one that was trained
        self._by_name = sorted(settings)
        for name, of in settings.items():
            kind = of.get("embedder", "")
            if kind not in EMBEDDERS:
                raise UserError(
                    f"condition {name!r}: unknown embedder {kind!r}{nearest(kind, EMBEDDERS)}; choose from "
                    f"{', '.join(EMBEDDERS)}"
                )
            arguments = {key: value for key, value in of.items() if key != "embedder"}
            self[name] = EMBEDDERS[kind](width, grid, **arguments)

    @property
    def features(self) -> int:
        """Features that all together put beside every patch."""
        return sum(embedder.features for embedder in self.values())

    @property
    def words_width(self) -> int:
        """Width of the tokens, of one condition at most, that the lowest level attends to; 0 for none."""
        return max((embedder.words_width for embedder in self.values()), default=0)

    def words(self, conditions: Conditions) -> Words | None:
        """Return the tokens that the lowest level attends to; None where there are none."""
        for name, embedder in self.items():
            if embedder.words_width:
                return embedder.words(conditions.get(name), conditions.dropped.get(name))
        return None

    def check(self, conditions: Conditions) -> None:
        """Refuse conditions that the network does not have, and the lack of one that it needs.

        Raises:
            ValueError: naming it.
        """
        for name in conditions:
            if name not in self:
                raise ValueError(f"this network has no condition {name!r}")
        for name, embedder in self.items():
            if not embedder.optional and (name not in conditions or name in conditions.dropped):
                raise ValueError(f"this network needs the condition {name!r} for every image")

    def forward(self, conditions: Conditions, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return what stands beside the patches (B, H, W, features), and vectors (B or 1, width)."""
        self.check(conditions)
        beside: list[Tensor] = []
        vectors: list[Tensor] = []
        for name in self._by_name:
            embedder, value, dropped = self[name], conditions.get(name), conditions.dropped.get(name)
            (beside if embedder.features else vectors).append(embedder(value, dropped, tokens))
        return beside, vectors


def example_conditions(
    settings: Mapping[str, Mapping[str, Any]], batch: int, generator: torch.Generator | None = None
) -> Conditions:
    """Return random conditions for a network whose config has these settings, on the CPU.

    Args:
        settings: as for `ConditionEmbedders`.
        batch: rows.
        generator: of the numbers.
    """
    values: dict[str, Tensor] = {}
    for name, of in settings.items():
        if of["embedder"] == "class":
            values[name] = torch.randint(of["classes"], (batch,), generator=generator)
        elif of["embedder"] == "characters":
            letters = torch.randint(97, 123, (batch, of["length"]), generator=generator)
            values[name] = letters.to(torch.uint8)
        elif of["embedder"] == "encoded":
            rows = 1 + of["length"] * of.get("tokens", False)
            values[name] = torch.randn(batch, rows, of["features"], generator=generator)
        elif of["embedder"] == "scalar":
            values[name] = of.get("largest", 1.0) * torch.rand(batch, generator=generator)
        elif of["embedder"] == "range":
            share = torch.rand(batch, generator=generator)
            values[name] = of["low"] + share * (of["high"] - of["low"])
        elif of["embedder"] == "numbers":
            values[name] = torch.randn(batch, of["numbers"], generator=generator)
        else:
            values[name] = torch.randn(batch, of["channels"], *pair(of["size"]), generator=generator)
    return Conditions(**values)
