"""Words for a network, without any vocabulary: bytes of a text, and an encoder that is trained along.

A text is a row of bytes, (B, length), 0 behind its end; a row of zeros is no text. The encoder adds up a
vector for each word and for each piece of 3 to 5 bytes of a word (hashed n-grams, as in fastText, arXiv
1607.04606). So a word that it never met is known by its pieces, words that are written in one are near those
that are not, and their order does not matter.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lediflow.networks.hourglass import linear

SPACE = 32
MOST_WORDS = 16  # of a text, among which some are left out in training
PIECES = (3, 4, 5)  # bytes of a piece, which may begin before a word and end behind it
_PRIME, _BASE = 2**31 - 1, 1_000_003  # of the hash: a product of two residues fits in 63 bits


def plain_words(text: str) -> str:
    """Return the words of a text in small letters, one space between them; punctuation and accents go."""
    spread = unicodedata.normalize("NFKD", text.casefold())
    letters = [c for c in spread if not 0x300 <= ord(c) <= 0x36F]  # accents
    words = "".join(c if unicodedata.category(c)[0] in "LMNS" else " " for c in letters).split()
    return unicodedata.normalize("NFC", " ".join(words))


def text_bytes(texts: Sequence[str], length: int) -> Tensor:
    """Return texts as bytes, uint8 (N, length); what is longer is cut."""
    rows = torch.zeros(len(texts), length, dtype=torch.uint8)
    for row, text in zip(rows, texts, strict=True):
        found = plain_words(text).encode()[:length]
        row[: len(found)] = torch.frombuffer(bytearray(found), dtype=torch.uint8) if found else 0
    return rows


def without_words(texts: Tensor, out: Tensor) -> Tensor:
    """Return texts without some of their words; one that would lose all of them keeps them.

    Args:
        texts: bytes, uint8 (B, length).
        out: which words go, bool (B, n); a word beyond the n-th stays.
    """
    space = texts == SPACE
    word = space.cumsum(1)
    gone = out.gather(1, word.clamp_max(out.shape[1] - 1)) & (word < out.shape[1])
    left = texts.masked_fill(gone & (texts != 0), SPACE)
    none = ((left == SPACE) | (left == 0)).all(1, keepdim=True)
    return torch.where(none, texts, left)


class CharacterEncoder(nn.Module):
    """Bytes of texts -> vectors: the sum of what is learned of each word and piece, and a small network.

    Args:
        width: of the vectors.
        buckets: rows of the table; words and pieces whose hashes meet share one.
        features: of a row.
    """

    def __init__(self, width: int, *, buckets: int, features: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.embedding = nn.Embedding(buckets, features)
        # small, so that pieces that no training text had say next to nothing
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.hidden = linear(features, 2 * width)
        self.out = linear(2 * width, width)

    def forward(self, texts: Tensor) -> Tensor:
        """(B, length) -> (B, width); the row of a text without words is 0."""
        places, there = hashed_pieces(texts, self.buckets)
        weights = there * there.sum(1, keepdim=True).clamp_min(1).rsqrt()
        table = self.embedding.weight
        total = F.embedding_bag(places, table, mode="sum", per_sample_weights=weights.to(table.dtype))
        return self.out(F.silu(self.hidden(total)))


def hashed_pieces(texts: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
    """Return the rows of the table for every piece and word of texts.

    Args:
        texts: bytes, (B, length).
        buckets: rows of the table.

    Returns:
        int64 and bool (B, n): the rows, and whether there is such a piece.
    """
    letters = F.pad(texts.long().masked_fill(texts == 0, SPACE), (1, max(PIECES)), value=SPACE)
    space = letters == SPACE
    count = texts.shape[1] + 1
    found, there = [], []
    for n in PIECES:
        hashed = sum(letters[:, j : j + count] * pow(_BASE, n + j, _PRIME) for j in range(n)) % _PRIME
        hashed = hashed * hashed % _PRIME  # not linear, so that sums of them tell words apart
        inside = torch.stack([~space[:, j : j + count] for j in range(1, n - 1)]).all(0)
        found.append(hashed)
        there.append(inside)
    # a word is the sum of its pieces of three: all sums up to its end less those up to its start
    sums = (found[0] * there[0]).cumsum(1)
    at = torch.arange(count, device=texts.device).expand(len(texts), -1)
    start = torch.where(space[:, :count], at, 0).cummax(1).values
    ends = ~space[:, :count] & space[:, 1 : count + 1]
    before = sums - found[0] * there[0]
    found.append((before - before.gather(1, start) + 1) % _PRIME)  # a word of one letter is no piece
    there.append(ends)
    return torch.cat(found, 1) % buckets, torch.cat(there, 1)
