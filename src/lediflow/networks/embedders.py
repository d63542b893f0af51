"""What embeds one condition: features beside every patch, or a vector for the mapping network."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lediflow.errors import UserError
from lediflow.networks.hourglass import FourierFeatures, RMSNorm, Words, linear, pair, patchify
from lediflow.networks.text import CharacterEncoder


class Embedder(nn.Module, ABC):
    """Embeds one condition.

    Args:
        optional: the condition may be left out, for all images or for some. A network should only be asked
            to do without what it sometimes lacked in training.

    Attributes:
        features: how many it puts beside every patch; 0 for an embedder that gives a vector.
        words_width: of the tokens that it gives besides (`words`); 0 for none.
    """

    features = 0
    words_width = 0

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

    def words(self, value: Tensor | None, dropped: Tensor | None) -> Words | None:
        """Return tokens that the lowest level attends to; None where there are none."""
        return None


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
        return without(self.linear(self.fourier(value / self.largest).to(weight.dtype)), dropped)


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
        return without(self.linear(self.fourier(share).to(weight.dtype)), dropped)


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
        return without(self.linear(value.to(weight.dtype)), dropped)


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
        return without(self.linear(value.flatten(1).to(weight.dtype)), dropped)


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
        return without(value, dropped)


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
        return without(self.encoder(value), dropped)


class EncodedEmbedder(Embedder):
    """A text, told by what a frozen encoder made of it (see `lediflow.text_encoders`).

    A value is (B, 1, features), the text as one vector, or (B, 1 + length, features), and then each of its
    tokens. Rows behind its end are 0, and so are all of no text.

    Args:
        width: of the vector, and of the tokens.
        grid: of tokens; not used.
        features: of the encoder.
        length: tokens of a text.
        tokens: the lowest level attends to the tokens too.
        optional: see `Embedder`; a text that is not given, or has no words, embeds to 0 and has no tokens.
    """

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        *,
        features: int,
        length: int,
        tokens: bool = False,
        optional: bool = True,
    ) -> None:
        super().__init__(optional=optional)
        # encoders differ a hundredfold in how large their numbers are
        self.norm, self.linear = RMSNorm(features), linear(features, width)
        if tokens:
            self.words_width = width
            self.words_norm, self.words_linear = RMSNorm(features), linear(features, width)

    def forward(self, value: Tensor | None, dropped: Tensor | None, tokens: Tensor) -> Tensor:
        """(B, 1 [+ length], features) -> (B, width)."""
        weight = self.linear.weight
        if value is None:
            return weight.new_zeros(1, len(weight))
        return without(self.linear(self.norm(value[:, 0].to(weight.dtype))), dropped)

    def words(self, value: Tensor | None, dropped: Tensor | None) -> Words | None:
        """(B, 1 + length, features) -> tokens (B, length, width), and which of them are there."""
        if value is None or not self.words_width:
            return None
        told = value[:, 1:]
        there = (told != 0).any(-1)
        if dropped is not None:
            there = there & ~dropped[:, None]
        return Words(self.words_linear(self.words_norm(told.to(self.words_linear.weight.dtype))), there)


def without(embedded: Tensor, dropped: Tensor | None) -> Tensor:
    """Zero the dropped rows."""
    if dropped is None:
        return embedded
    return embedded.masked_fill(dropped.view(-1, *[1] * (embedded.ndim - 1)), 0.0)
