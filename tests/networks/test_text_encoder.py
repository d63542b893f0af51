"""Bytes of a text, words that go, and the encoder: what it is blind to and what it is not."""

import pytest
import torch
from conftest import randomized

from lediflow.conditions import Conditions
from lediflow.networks.conditions import ConditionEmbedders
from lediflow.networks.text import (
    PIECES,
    CharacterEncoder,
    hashed_pieces,
    plain_words,
    text_bytes,
    without_words,
)

LENGTH = 24


def words(rows):
    return ["".join(map(chr, row[row > 0].tolist())).split() for row in rows]


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return randomized(CharacterEncoder(8, buckets=512, features=16))


def encoded(encoder, *texts, length=LENGTH):
    return encoder(text_bytes(texts, length))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  Red  HEART ", "red heart"),
        ("t-shirt, (blue)!", "t shirt blue"),
        ("Café à la crème", "cafe a la creme"),
        ("Straße", "strasse"),
        ("ハート 心", "ハート 心"),
        ("हिन्दी", "हिन्दी"),
        ("1 + 1 = 2", "1 + 1 = 2"),
        ("\n\t\0 …", ""),
    ],
)
def test_words_lose_case_accents_and_punctuation_and_nothing_else(text, plain):
    assert plain_words(text) == plain


def test_bytes_are_padded_with_zeros_and_cut():
    rows = text_bytes(["Ab", "", "abcdefgh"], 4)
    assert rows.dtype == torch.uint8
    assert rows.tolist() == [[97, 98, 0, 0], [0, 0, 0, 0], [97, 98, 99, 100]]


def pieces_of(text):
    """Every piece, and the words, by their definition."""
    found = []
    for word in text.split():
        padded = f" {word} "
        found += [padded[i : i + n] for n in PIECES for i in range(len(padded) - n + 1)]
    return found, text.split()


@pytest.mark.parametrize("text", ["red heart", "a", "a bc", "grinningface", "one two three 4"])
def test_pieces_are_those_of_the_words_and_the_words(text):
    pieces, whole = pieces_of(text)
    rows, there = hashed_pieces(text_bytes([text], LENGTH), 2**30)
    kinds = rows[there]
    assert len(kinds) == len(pieces) + len(whole)
    assert len(kinds.unique()) == len(set(pieces)) + len(set(whole)), "two of them share a row of 2^30"


def test_the_order_of_words_their_case_and_the_padding_do_not_matter(encoder):
    first, second = encoded(encoder, "red heart", "HEART: Red")
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(encoded(encoder, "red heart", length=40)[0], first)


def test_a_word_is_not_its_letters_in_another_order(encoder):
    vectors = encoded(encoder, "stop", "post", "pots", "red heart", "redheart", "heart")
    assert torch.pdist(vectors).min() > 1e-2


def test_words_written_in_one_share_most_pieces():
    rows, there = hashed_pieces(text_bytes(["grinningface", "grinning face", "yellow cat"], LENGTH), 2**30)
    one, two, other = (set(r[t].tolist()) for r, t in zip(rows, there, strict=True))
    assert len(one & two) > 0.5 * len(one) and not one & other


def test_no_words_embed_to_nothing(encoder):
    assert encoded(encoder, "", "?!").abs().max() == 0


def test_an_image_without_a_text_is_one_whose_text_is_dropped():
    embedders = ConditionEmbedders({"text": {"embedder": "characters", "length": LENGTH}}, 8, (2, 2))
    randomized(embedders)
    tokens = torch.zeros(2, 2, 2, 4)
    told = Conditions(text=text_bytes(["cat", ""], LENGTH))
    _, (vector,) = embedders(told, tokens)
    assert vector[0].abs().max() > 0 and vector[1].abs().max() == 0
    _, (dropped,) = embedders(told.drop("text"), tokens)
    _, (nothing,) = embedders(Conditions(), tokens)
    assert dropped.abs().max() == 0 and nothing.shape == (1, 8) and nothing.abs().max() == 0


def test_words_go_and_the_others_stay_where_they_are():
    texts = text_bytes(["red heart with wings", "cat", "a b"], LENGTH)
    out = torch.tensor([[True, False, True, False], [True, False, False, False], [True, True, False, False]])
    left = without_words(texts, out)
    assert words(left) == [["heart", "wings"], ["cat"], ["a", "b"]], "the last word of a text stays"
    assert left.shape == texts.shape and left.dtype == texts.dtype
    assert torch.equal(without_words(texts, torch.zeros(3, 4, dtype=torch.bool)), texts)
    assert words(without_words(text_bytes(["a b c"], 8), torch.tensor([[False, True]])))[0] == ["a", "c"]


def test_bf16_weights_encode_in_bf16(encoder):
    assert encoded(encoder.to(torch.bfloat16), "red heart").dtype == torch.bfloat16
