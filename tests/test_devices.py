"""Which number format "auto" is."""

import pytest
import torch

from lediflow import UserError
from lediflow.devices import settle_precision

CPU = torch.device("cpu")


def test_a_named_format_is_taken_as_it_is():
    assert [settle_precision(name, CPU) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True, "cpu_name": "bf16"}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_auto_follows_the_instructions_of_the_cpu(monkeypatch, instructions, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    assert settle_precision("auto", CPU) == expected


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_does_not_take_what_a_gpu_emulates(monkeypatch, supported, expected):
    asked = []

    def is_bf16_supported(including_emulation=True):
        asked.append(including_emulation)
        return supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert settle_precision("auto", torch.device("cuda")) == expected
    assert asked == [False]


def test_auto_is_fp32_on_mps():
    assert settle_precision("auto", torch.device("mps")) == "fp32"


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match=r"unknown dtype 'bf17' \(did you mean 'bf16'\?\); choose from auto"):
        settle_precision("bf17", CPU)


def test_a_busy_machine_is_said(monkeypatch):
    import psutil

    from lediflow.devices import load_words

    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    for load, words in ((2.9, ""), (6.0, "this machine is busy (load 6.0 on 4 cores)")):
        monkeypatch.setattr(psutil, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert load_words() == words
