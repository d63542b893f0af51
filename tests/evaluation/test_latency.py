from __future__ import annotations

import time

import pytest
import torch

from lediflow.errors import UserError
from lediflow.evaluation import latency
from lediflow.evaluation.latency import compare, peak_memory


class Clock:
    """Stands in for the clock; each call of a candidate moves it on by what the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now)

    def work(self, *seconds: float):
        left = list(seconds)

        def fn() -> None:
            self.now += left.pop(0)

        return fn


def test_candidates_take_turns():
    calls: list[str] = []
    fns = {name: (lambda name=name: calls.append(name)) for name in "ABC"}
    results = compare(fns, images=2, repeats=3, warmup=2)
    assert "".join(calls) == "ABC" * 5
    assert list(results) == ["A", "B", "C"]


def test_figures_leave_the_warm_up_out(monkeypatch):
    clock = Clock(monkeypatch)
    result = compare({"A": clock.work(100.0, 1.0, 2.0, 4.0)}, images=8, repeats=3, warmup=1)["A"]
    assert result.ms_per_image == pytest.approx(2000 / 8)
    assert result.images_per_second == pytest.approx(8 / 2)
    assert result.spread == pytest.approx((4 - 1) / 2)


def test_each_candidate_has_its_own_time(monkeypatch):
    clock = Clock(monkeypatch)
    fns = {"slow": clock.work(3.0, 3.0), "fast": clock.work(1.0, 1.0)}
    results = compare(fns, images=1, repeats=2, warmup=0)
    assert results["slow"].ms_per_image == pytest.approx(3000)
    assert results["fast"].ms_per_image == pytest.approx(1000)
    assert results["fast"].spread == 0


def test_another_clock_may_count():
    now = iter((0.0, 2.0, 5.0, 9.0))
    result = compare({"A": lambda: None}, images=1, repeats=2, warmup=0, clock=lambda: next(now))["A"]
    assert result.ms_per_image == pytest.approx(3000)


def test_cuda_is_waited_for_on_both_sides_of_each_call(monkeypatch):
    events: list[str] = []
    monkeypatch.setattr(latency.torch.cuda, "synchronize", lambda device: events.append(str(device)))
    compare({"A": lambda: events.append("call")}, images=1, repeats=2, warmup=1, device="cuda:1")
    assert events == ["cuda:1", "call", "cuda:1"] * 3


def test_work_that_takes_no_time_has_finite_figures(monkeypatch):
    Clock(monkeypatch)
    result = compare({"A": lambda: None}, images=1)["A"]
    assert result.spread == 0
    assert result.images_per_second < float("inf")


@pytest.mark.parametrize("wrong", [{"images": 0}, {"repeats": 0}, {"warmup": -1}, {"fns": {}}])
def test_mistakes(wrong):
    arguments = {"fns": {"A": lambda: None}, "images": 1, **wrong}
    with pytest.raises(UserError, match="timing needs"):
        compare(**arguments)


def test_shares_of_parts(monkeypatch):
    clock = Clock(monkeypatch)

    class Network:
        def forward(self) -> str:
            clock.now += 3.0
            return "out"

    network = Network()

    def whole() -> None:
        assert network.forward() == "out"
        clock.now += 1.0
        assert network.forward() == "out"

    shares = latency.part_shares(whole, {"network": (network, "forward")}, repeats=2)
    assert shares == {"network": pytest.approx(6 / 7)}
    assert "forward" not in vars(network), "the object is left as it was"


def test_a_failing_call_leaves_the_object_as_it_was():
    class Network:
        calls = 0

        def forward(self) -> None:
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("no memory")

    network = Network()
    with pytest.raises(RuntimeError):
        latency.part_shares(lambda: network.forward(), {"network": (network, "forward")})
    assert "forward" not in vars(network)


def test_a_method_of_the_object_itself_comes_back():
    class Network:
        pass

    network, own = Network(), lambda: "own"
    network.run = own
    latency.part_shares(lambda: network.run(), {"network": (network, "run")}, repeats=1)
    assert network.run is own


def test_peak_memory_sees_what_was_held():
    with peak_memory(torch.device("cpu")) as before:
        time.sleep(0.05)
    with peak_memory(torch.device("cpu")) as peak:
        held = torch.ones(50_000_000)
        time.sleep(0.05)
    assert peak[0] - before[0] > 0.9 * held.numel() * 4
