"""Frozen text encoders against transformers itself, on tiny models with random weights."""

import sys

import pytest
import torch
from tiny_texts import write_clip, write_t5
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from lediflow.errors import UserError
from lediflow.text_encoders import TextEncoder, load_recorded

TEXTS = ["a cat", "cat", "", "act at a cat", "..."]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return write_t5(tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize("whole", [False, True])
def test_clips_vector_is_its_own_and_its_tokens_the_last_states(whole, tmp_path):
    folder = write_clip(tmp_path / "clip", whole=whole)
    encoder = TextEncoder.load(folder)
    assert (encoder.width, encoder.most) == (8, 8)
    made = encoder.encode(["a cat"], 8, tokens=True)
    model, ids = (
        CLIPTextModel.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder)("a cat").input_ids,
    )
    with torch.no_grad():
        expected = model(torch.tensor([ids]))
    assert made.shape == (1, 9, 8) and made.dtype == torch.float16
    torch.testing.assert_close(made[:, 0].float(), expected.pooler_output, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        made[:, 1 : 1 + len(ids)].float(), expected.last_hidden_state, rtol=1e-3, atol=1e-3
    )
    assert not made[:, 1 + len(ids) :].any()


def test_t5s_vector_is_the_mean_over_its_tokens(t5):
    encoder = TextEncoder.load(t5)
    assert encoder.width == 16
    ids = AutoTokenizer.from_pretrained(t5)("a cat").input_ids
    with torch.no_grad():
        states = T5EncoderModel.from_pretrained(t5)(torch.tensor([ids])).last_hidden_state
    made = encoder.encode(["a cat"], 12, tokens=True).float()
    torch.testing.assert_close(made[:, 0], states.mean(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(made[:, 1 : 1 + len(ids)], states, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_text_is_the_same_among_longer_ones_and_none_is_nothing(kind, request):
    encoder = TextEncoder.load(request.getfixturevalue(kind))
    together = encoder.encode(TEXTS, 8, tokens=True)
    alone = torch.cat([encoder.encode([text], 8, tokens=True) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-3)
    assert not together[2].any() and not together[4].any(), "a text without words is none"
    assert (together[0] - together[1]).abs().max() > 0.02
    assert torch.equal(encoder.encode(TEXTS, 8, tokens=False), together[:, :1])


def test_a_long_text_is_cut_and_named(clip):
    encoder = TextEncoder.load(clip)
    long = "cat act at a cat"
    assert encoder.cut(["a cat", long], 8) == [long]
    assert encoder.encode([long], 4, tokens=True).shape == (1, 5, 8)
    with pytest.raises(UserError, match="text.max_length 2 leaves no room for words"):
        encoder.check_length(2)


def test_an_encoder_is_found_again_by_its_record_and_another_is_refused(clip, tmp_path):
    encoder = TextEncoder.load(clip)
    record = encoder.record()
    assert record["revision"] is None and record["name"] == str(clip)
    assert load_recorded(record, device="cpu").fingerprint == encoder.fingerprint
    other = write_clip(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="is not the one that this model was trained with"):
        load_recorded(record, other, device="cpu")
    with pytest.raises(
        UserError, match="no text encoder.*The model reads prompts with.*'gone'.*--text-encoder"
    ):
        load_recorded({**record, "name": "gone"}, device="cpu")
    moved = write_clip(tmp_path / "moved")
    assert load_recorded({**record, "name": "gone"}, moved, device="cpu").name == str(moved)


@pytest.mark.parametrize("name", ["charcters", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_what_is_no_encoder_is_refused(name):
    with pytest.raises(UserError, match="no text encoder .*give `characters`, the folder of"):
        TextEncoder.load(name)


def test_a_folder_that_holds_none_or_too_little_is_refused(clip, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot load the text encoder"):
        TextEncoder.load(tmp_path / "empty")
    from safetensors.torch import load_file, save_file

    lacking = write_clip(tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    del weights[sorted(weights)[0]]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its weights lack "):
        TextEncoder.load(lacking)
    pickled = write_clip(tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load the text encoder"):
        TextEncoder.load(pickled)


def test_without_transformers_the_extra_is_named(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    with pytest.raises(UserError, match=r"pip install 'lediflow\[text\]'"):
        TextEncoder.load(clip)
