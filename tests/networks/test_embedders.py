"""One embedder for each kind of condition: what it gives, for rows that are dropped, and for none at all."""

import pytest
import torch
from conftest import randomized

from lediflow.conditions import Conditions
from lediflow.errors import UserError
from lediflow.networks.conditions import EMBEDDERS, ConditionEmbedders, example_conditions
from lediflow.networks.hourglass import patchify

WIDTH, GRID = 6, (4, 4)
SETTINGS = {
    "class": {"embedder": "class", "classes": 3},
    "scalar": {"embedder": "scalar"},
    "range": {"embedder": "range", "low": -1.0, "high": 3.0},
    "numbers": {"embedder": "numbers", "numbers": 4},
    "flat": {"embedder": "flat", "channels": 2, "size": [2, 4]},
    "coarser": {"embedder": "grid", "channels": 2, "size": 2},
    "finer": {"embedder": "grid", "channels": 1, "size": 8},
    "characters": {"embedder": "characters", "length": 12, "buckets": 64, "features": 4},
    "encoded": {"embedder": "encoded", "features": 5, "length": 3},
}
TOKENS = torch.zeros(3, *GRID, 5)


def one(kind, **changes):
    """A network's embedders with only this one, under the name `it`, and its weights random."""
    torch.manual_seed(1)
    embedders = ConditionEmbedders({"it": {**SETTINGS[kind], **changes}}, WIDTH, GRID)
    for parameter in embedders.parameters():
        torch.nn.init.normal_(parameter)
    return embedders


def embedded(embedders, conditions):
    beside, vectors = embedders(conditions, TOKENS)
    assert len(beside) + len(vectors) == 1
    return (beside or vectors)[0]


def example(kind):
    return example_conditions({"it": SETTINGS[kind]}, 3, torch.Generator().manual_seed(0))


def test_every_embedder_is_tried_here():
    assert {settings["embedder"] for settings in SETTINGS.values()} == set(EMBEDDERS)


def test_a_class_is_a_row_and_no_class_the_last():
    embedders = one("class")
    rows = embedders["it"].embedding.weight
    assert rows.shape == (4, WIDTH)
    labels = Conditions(it=torch.tensor([2, 0, 1]))
    assert torch.equal(embedded(embedders, labels), rows[[2, 0, 1]])
    dropped = labels.drop("it", torch.tensor([False, True, False]))
    assert torch.equal(embedded(embedders, dropped), rows[[2, 3, 1]])
    assert torch.equal(embedded(embedders, Conditions()), rows[3:])
    assert torch.equal(labels["it"], torch.tensor([2, 0, 1])), "the labels are as they were"


def test_a_number_is_told_by_its_fourier_features():
    embedders = one("scalar")
    level = torch.tensor([0.0, 0.25, 1.0])
    embedder = embedders["it"]
    expected = embedder.fourier(level) @ embedder.linear.weight.T
    torch.testing.assert_close(embedded(embedders, Conditions(it=level)), expected)
    assert torch.pdist(expected).min() > 0.1


def test_numbers_are_one_linear_map_and_none_is_all_of_them_0():
    embedders = one("numbers")
    value = torch.tensor([[1.0, 0, -1, 0.5], [0, 0, 0, 0]])
    expected = value @ embedders["it"].linear.weight.T
    torch.testing.assert_close(embedded(embedders, Conditions(it=value)), expected)
    assert not embedded(embedders, Conditions()).any() and not expected[1].any()


def test_a_flat_grid_is_one_linear_map():
    embedders, told = one("flat"), example("flat")
    assert told["it"].shape == (3, 2, 2, 4)
    expected = told["it"].flatten(1) @ embedders["it"].linear.weight.T
    torch.testing.assert_close(embedded(embedders, told), expected)


def test_a_coarser_grid_is_repeated_and_a_finer_one_cut_into_patches():
    told = example("coarser")
    beside = embedded(one("coarser"), told)
    assert beside.shape == (3, *GRID, 2)
    for i in range(4):
        for j in range(4):
            assert torch.equal(beside[:, i, j], told["it"][:, :, i // 2, j // 2])
    told = example("finer")
    assert torch.equal(embedded(one("finer"), told), patchify(told["it"].movedim(1, -1), 2))
    assert one("finer").features == 4


@pytest.mark.parametrize("kind", [kind for kind in SETTINGS if kind != "class"])
def test_dropped_rows_and_what_is_not_given_embed_to_nothing(kind):
    embedders, told = one(kind, optional=True), example(kind)
    whole = embedded(embedders, told)
    some = embedded(embedders, told.drop("it", torch.tensor([False, True, False])))
    assert torch.equal(some[[0, 2]], whole[[0, 2]])
    assert whole[1].abs().max() > 0 and (some[1] == 0).all()
    none = embedded(embedders, Conditions())
    assert (none == 0).all()
    assert torch.equal(none.expand_as(whole), torch.zeros_like(whole)), "it fits where the other fits"


@pytest.mark.parametrize("kind", [kind for kind in SETTINGS if kind != "class"])
def test_what_a_network_needs_may_neither_lack_nor_be_dropped(kind):
    embedders, told = one(kind, optional=False), example(kind)
    for lacking in (Conditions(), told.drop("it", torch.tensor([False, True, False]))):
        with pytest.raises(ValueError, match="needs the condition 'it' for every image"):
            embedders(lacking, TOKENS)


def test_a_class_can_be_needed_too():
    with pytest.raises(ValueError, match="needs the condition 'it'"):
        one("class", optional=False)(Conditions(), TOKENS)


def test_what_a_network_does_not_have_is_refused_by_name():
    with pytest.raises(ValueError, match="has no condition 'image'"):
        one("class")(Conditions(image=torch.zeros(3, 1, 2, 2)), TOKENS)


def test_conditions_stand_beside_the_patches_in_one_order_whatever_that_of_the_config():
    """A saved config is sorted; the weights of what it reads back must meet the same features."""
    two = {name: SETTINGS[name] for name in ("finer", "coarser")}
    told = example_conditions(two, 2)
    beside, other = (
        torch.cat(ConditionEmbedders(settings, WIDTH, GRID)(told, TOKENS[:2])[0], dim=-1)
        for settings in (two, dict(reversed(two.items())))
    )
    assert torch.equal(beside, other)
    assert beside.shape[-1] == 6 and beside.std() > 0


def test_features_add_up_and_come_in_the_order_of_names():
    embedders = ConditionEmbedders(SETTINGS, WIDTH, GRID)
    assert embedders.features == 2 + 4
    beside, vectors = embedders(example_conditions(SETTINGS, 3), TOKENS)
    assert [part.shape for part in beside] == [(3, 4, 4, 2), (3, 4, 4, 4)]
    assert [part.shape for part in vectors] == [(3, WIDTH)] * 7


def test_bf16_weights_embed_in_bf16():
    embedders = ConditionEmbedders(SETTINGS, WIDTH, GRID).to(torch.bfloat16)
    beside, vectors = embedders(example_conditions(SETTINGS, 3), TOKENS.bfloat16())
    assert {part.dtype for part in (*beside, *vectors)} == {torch.bfloat16}


def test_settings_that_cannot_be_are_refused_by_name():
    with pytest.raises(UserError, match=r"condition 'z': unknown embedder 'grd' \(did you mean 'grid'\?\)"):
        ConditionEmbedders({"z": {"embedder": "grd"}}, WIDTH, GRID)
    for size in (3, 6, [4, 8]):
        with pytest.raises(UserError, match="does not fit a grid of 4x4 tokens"):
            ConditionEmbedders({"z": {"embedder": "grid", "channels": 1, "size": size}}, WIDTH, GRID)


def test_a_range_embeds_to_nothing_until_it_learns_and_at_its_low_end_always():
    settings = {"guidance": {"embedder": "range", "low": 1.0, "high": 3.0}}
    embedders = ConditionEmbedders(settings, 8, (4, 4))
    tokens, values = torch.zeros(3, 4, 4, 8), torch.tensor([1.0, 2.0, 3.0])
    _, (vector,) = embedders(Conditions(guidance=values), tokens)
    assert vector.abs().max() == 0
    randomized(embedders)
    _, (vector,) = embedders(Conditions(guidance=values), tokens)
    assert vector[0].abs().max() == 0 and vector[1:].abs().amax(1).min() > 1e-2
    _, (nothing,) = embedders(Conditions(), tokens)
    assert nothing.shape == (1, 8) and nothing.abs().max() == 0


def test_an_encoded_text_is_its_vector_brought_to_one_size_and_mapped():
    embedders = one("encoded")
    embedder, told = embedders["it"], example("encoded")
    vector = told["it"][:, 0]
    expected = torch.nn.functional.normalize(vector) * 5**0.5 * embedder.norm.scale @ embedder.linear.weight.T
    torch.testing.assert_close(embedded(embedders, told), expected, rtol=1e-4, atol=1e-5)
    tenfold = Conditions(it=10 * told["it"].half())
    torch.testing.assert_close(embedded(embedders, tenfold), expected, rtol=1e-2, atol=1e-2)
    assert embedders.words(told) is None and embedders.words_width == 0
    none = Conditions(it=torch.zeros(3, 1, 5))
    assert not embedded(embedders, none).any(), "a text without words is none"


def test_the_tokens_of_a_text_end_where_it_ends_and_go_where_it_is_dropped():
    embedders = one("encoded", tokens=True)
    value = example_conditions({"it": {**SETTINGS["encoded"], "tokens": True}}, 3)["it"]
    value[1, 3:] = 0
    told = Conditions(it=value).drop("it", torch.tensor([False, False, True]))
    words = embedders.words(told)
    assert words.tokens.shape == (3, 3, WIDTH) and embedders.words_width == WIDTH
    assert words.there.tolist() == [[True] * 3, [True, True, False], [False] * 3]
    assert embedders.words(Conditions()) is None
