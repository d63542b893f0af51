"""Conditions: named rows that are cut, joined, dropped and moved together."""

import pytest
import torch

from lediflow.conditions import NOTHING, Conditions


@pytest.fixture
def told():
    return Conditions(z=torch.arange(12.0).view(4, 3), label=torch.arange(4))


def test_names_values_and_what_is_not_there(told):
    assert list(told) == ["z", "label"] and len(told) == 2
    assert torch.equal(told["label"], torch.arange(4))
    assert "image" not in told
    assert "image" not in Conditions(image=None), "None stands for nothing"
    assert not NOTHING and len(NOTHING) == 0
    assert repr(told) == "Conditions(z=(4, 3), label=(4,))"


def test_more_conditions_keep_what_was_dropped(told):
    more = told.drop("label", torch.tensor([True, False, False, False])).also(image=torch.ones(4, 1, 2, 2))
    assert list(more) == ["z", "label", "image"]
    assert more.dropped["label"].tolist() == [True, False, False, False]
    assert list(told) == ["z", "label"] and not told.dropped, "the first are as they were"
    assert torch.equal(told.also(z=torch.zeros(4, 3))["z"], torch.zeros(4, 3)), "the later value counts"


def test_dropped_rows_add_up(told):
    first, third = torch.tensor([True, False, False, False]), torch.tensor([False, False, True, False])
    both = told.drop("label", first).drop("label", third)
    assert both.dropped["label"].tolist() == [True, False, True, False]
    assert torch.equal(both["label"], told["label"]), "the values stay"
    assert told.drop("z").dropped["z"].all() and "label" not in told.drop("z").dropped
    with pytest.raises(KeyError, match="image"):
        told.drop("image")


@pytest.mark.parametrize(
    "index", [slice(1, 3), [1, 2], torch.tensor([1, 2])], ids=["slice", "list", "tensor"]
)
def test_rows_are_of_values_and_masks_alike(told, index):
    some = told.drop("label", torch.tensor([True, True, False, False])).rows(index)
    assert some["label"].tolist() == [1, 2]
    assert torch.equal(some["z"], told["z"][1:3])
    assert some.dropped["label"].tolist() == [True, False]


def test_joined_rows_keep_their_order_and_what_was_dropped_of_each(told):
    joined = Conditions.cat((told.drop("label"), told, told.rows([3])))
    assert joined["label"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 3]
    assert joined.dropped["label"].tolist() == [True] * 4 + [False] * 5
    assert "z" not in joined.dropped, "nobody dropped any"
    assert not Conditions.cat((told, told)).dropped
    with pytest.raises(KeyError, match="z"):
        Conditions.cat((told, Conditions(label=torch.arange(2))))


def test_values_and_masks_move_together(told):
    moved = told.drop("label", torch.tensor([True, False, False, False])).to("meta")
    assert {value.device.type for value in (*moved.values(), *moved.dropped.values())} == {"meta"}
