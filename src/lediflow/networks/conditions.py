"""One embedder for each kind of condition: features beside every patch, or a vector for the mapping network.

A network's config names its conditions and how each is embedded, as in

    {"label": {"embedder": "class", "classes": 10}, "z": {"embedder": "grid", "channels": 4, "size": 8}}
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lediflow.conditions import Conditions
from lediflow.errors import UserError, nearest
from lediflow.networks.hourglass import FourierFeatures, linear, pair, patchify
from lediflow.networks.text import CharacterEncoder


class Embedder(nn.Module, ABC):
    """Embeds one condition.

    Args:
        optional: the condition may be left out, for all images or for some. A network should only be asked
            to do without what it sometimes lacked in training.

    Attributes:
        features: how many it puts beside every patch; 0 for an embedder that gives a vector.
    """

    features = 0

    def __init__(self, *, optional: bool) -> None:
        super().__init__()
        self.optional = optional

    @abstractmethod
    def forward(self, value: Tensor | None, dropped: Tensor | None, tokens: Tensor) -> Tensor:
        """Embed a condition.

        Args:
            value: (B, ...); None where it is not given.
            dropped: rows that count as not given, bool (B,); None for no row.
            tokens: the patches, (B, H, W, C), whose grid and dtype the result has.

        Returns:
            (B, H, W, features), or a vector (B or 1, width).
        """


class ClassEmbedder(Embedder):
    """A learned vector for each class, and one for "no class".

    Args:
        width: of the vector.
        grid: of tokens; not used.
        classes: their number; values are integers in [0, classes).
        optional: see `Embedder`.
    """

    def __init__(self, width: int, grid: tuple[int, int], *, classes: int, optional: bool = True) -> None:
        super().__init__(optional=optional)
        self.classes = classes
        self.embedding = nn.Embedding(classes + 1, width)  # the last row: no class

    def forward(self, value: Tensor | None, dropped: Tensor | None, tokens: Tensor) -> Tensor:
        """(B,) -> (B, width); (1, width) where there is no value."""
        if value is None:
            return self.embedding.weight[-1:]
        if dropped is not None:
            value = value.masked_fill(dropped, self.classes)
        return self.embedding(value)


class ScalarEmbedder(Embedder):
    """Fourier features of a number, such as the noise level, and a linear map.

    Args:
        width: of the vector.
        grid: of tokens; not used.
        largest: the numbers lie in [0, largest].
        optional: see `Embedder`; a number that is not given embeds to 0.
    """

    def __init__(
        self, width: int, grid: tuple[int, int], *, largest: float = 1.0, optional: bool = False
    ) -> None:
        super().__init__(optional=optional)
        self.largest = largest
        self.fourier = FourierFeatures(width)
        self.linear = linear(width, width)

    def forward(self, value: Tensor | None, dropped: Tensor | None, tokens: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        weight = self.linear.weight
        if value is None:
            return weight.new_zeros(1, len(weight))
        return _without(self.linear(self.fourier(value / self.largest).to(weight.dtype)), dropped)


class IntervalFeatures(nn.Module):
    """sin and cos - 1 of 2 pi f s for low frequencies f: all 0 at s = 0, where u is v.

    The correction of the average velocity contains the derivative of these features, which is large for high
    frequencies whatever the network has learned.
    """

    frequencies: Tensor

    def __init__(self, width: int, lowest: float = 0.05, highest: float = 0.6):
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(lowest, highest, width // 2))

    def forward(self, s: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        angles = 2 * math.pi * s[:, None] * self.frequencies
        return torch.cat((angles.sin(), angles.cos() - 1), dim=-1)


class RangeEmbedder(Embedder):
    """A number between `low` and `high`, such as the strength of guidance.

    Untrained it embeds to 0, so that a network that is told more than the one it starts from is the same
    function; the vector at `low` stays 0.

    Args:
        width: of the vector.
        grid: of tokens; not used.
        low: least value.
        high: largest value.
        optional: see `Embedder`; a number that is not given counts as `low`.
    """

    def __init__(
        self, width: int, grid: tuple[int, int], *, low: float, high: float, optional: bool = True
    ) -> None:
        super().__init__(optional=optional)
        self.low, self.high = low, high
        self.fourier = IntervalFeatures(width)
        self.linear = linear(width, width, zero=True)

    def forward(self, value: Tensor | None, dropped: Tensor | None, tokens: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        weight = self.linear.weight
        if value is None:
            return weight.new_zeros(1, len(weight))
        share = (value.float() - self.low) / (self.high - self.low)
        return _without(self.linear(self.fourier(share).to(weight.dtype)), dropped)


class NumbersEmbedder(Embedder):
    """A linear map of some numbers, without a constant: none given is all of them 0.

    Args:
        width: of the vector.
        grid: of tokens; not used.
        numbers: how many.
        optional: see `Embedder`.
    """

    def __init__(self, width: int, grid: tuple[int, int], *, numbers: int, optional: bool = True) -> None:
        super().__init__(optional=optional)
        self.linear = linear(numbers, width)

    def forward(self, value: Tensor | None, dropped: Tensor | None, tokens: Tensor) -> Tensor:
        """(B, numbers) -> (B, width)."""
        weight = self.linear.weight
        if value is None:
            return weight.new_zeros(1, len(weight))
        return _without(self.linear(value.to(weight.dtype)), dropped)


class FlatEmbedder(Embedder):
    """A linear map of all numbers of a small grid, such as z.

    Args:
        width: of the vector.
        grid: of tokens; not used.
        channels: of the condition.
        size: its side, or (H, W).
        optional: see `Embedder`; a grid that is not given embeds to 0.
    """

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        *,
        channels: int,
        size: int | Sequence[int],
        optional: bool = False,
    ) -> None:
        super().__init__(optional=optional)
        self.linear = linear(channels * math.prod(pair(size)), width)

    def forward(self, value: Tensor | None, dropped: Tensor | None, tokens: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, width)."""
        weight = self.linear.weight
        if value is None:
            return weight.new_zeros(1, len(weight))
        return _without(self.linear(value.flatten(1).to(weight.dtype)), dropped)


class GridEmbedder(Embedder):
    """A grid of numbers, such as z or an image, brought to the grid of tokens and put beside the patches.

    Args:
        width: of vectors; not used.
        grid: of tokens, at the size that the network is built for.
        channels: of the condition.
        size: its side, or (H, W), at that size; one grid must be a multiple of the other.
        optional: see `Embedder`; a grid that is not given is 0.

    Raises:
        UserError: neither grid is a multiple of the other.
    """

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        *,
        channels: int,
        size: int | Sequence[int],
        optional: bool = False,
    ) -> None:
        super().__init__(optional=optional)
        h, w = pair(size)
        finer = h % grid[0] == 0 and w % grid[1] == 0 and h // grid[0] == w // grid[1]
        if not finer and (grid[0] % h or grid[1] % w):
            raise UserError(
                f"a condition of {h}x{w} does not fit a grid of {grid[0]}x{grid[1]} tokens; one must be a "
                "multiple of the other (for z change z_size or patch_size)"
            )
        self.patch = h // grid[0] if finer else 1
        self.features = channels * self.patch**2

    def forward(self, value: Tensor | None, dropped: Tensor | None, tokens: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, H, W, features): patches of a finer grid, repeats of a coarser one."""
        h, w = tokens.shape[1:3]
        if value is None:
            return tokens.new_zeros(*tokens.shape[:3], self.features)
        value = value.movedim(1, -1).to(tokens.dtype)
        if self.patch > 1:
            value = patchify(value, self.patch)
        else:
            value = value.repeat_interleave(h // value.shape[1], 1).repeat_interleave(w // value.shape[2], 2)
        return _without(value, dropped)


class CharactersEmbedder(Embedder):
    """A text, told by its bytes to an encoder that is trained along (see `networks.text`).

    Args:
        width: of the vector.
        grid: of tokens; not used.
        length: bytes of a text.
        buckets: rows of the encoder's table.
        features: of a row.
        optional: see `Embedder`; a text that is not given, or has no words, embeds to 0.
    """

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        *,
        length: int,
        buckets: int = 2**14,
        features: int = 64,
        optional: bool = True,
    ) -> None:
        super().__init__(optional=optional)
        self.encoder = CharacterEncoder(width, buckets=buckets, features=features)

    def forward(self, value: Tensor | None, dropped: Tensor | None, tokens: Tensor) -> Tensor:
        """(B, length) -> (B, width)."""
        if value is None:
            weight = self.encoder.out.weight
            return weight.new_zeros(1, len(weight))
        return _without(self.encoder(value), dropped)


def _without(embedded: Tensor, dropped: Tensor | None) -> Tensor:
    """Zero the dropped rows."""
    if dropped is None:
        return embedded
    return embedded.masked_fill(dropped.view(-1, *[1] * (embedded.ndim - 1)), 0.0)


EMBEDDERS: dict[str, Any] = {
    "class": ClassEmbedder,
    "scalar": ScalarEmbedder,
    "range": RangeEmbedder,
    "numbers": NumbersEmbedder,
    "flat": FlatEmbedder,
    "grid": GridEmbedder,
    "characters": CharactersEmbedder,
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
        for name, embedder in self.items():
            value, dropped = conditions.get(name), conditions.dropped.get(name)
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
