"""A few hundred made-up cases of everything that a user hands over; benchmarks/fuzz.py runs 10,000.

A user's mistake, and a stranger's malice, end in a UserError: nothing else may be raised.
"""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets.disable_progress_bars()


@pytest.fixture
def fuzz(monkeypatch, tiny_run):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import fuzz
    import fuzz_folders

    monkeypatch.setattr(fuzz_folders, "RUN", [tiny_run])
    return fuzz


CASES = [
    *(("pictures", 200), ("arguments", 60), ("datasets", 15), ("settings", 60), ("pipelines", 15)),
    *(("configs", 40), ("masks", 40)),
]


@pytest.mark.parametrize(("family", "cases"), CASES)
def test_made_up_cases_end_in_a_user_error_or_well(fuzz, family, cases):
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]

    @settings(max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)
    @given(fuzz.FAMILIES[family][0])
    def each(case):
        fuzz.survives(family, case)

    each()


def test_the_script_counts_its_cases_and_tells_what_fails(tmp_path):
    script = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--family", "pictures", "--cases", "20"]
    done = subprocess.run([*script, "--run", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["cases"] >= 20 and result["failed"] == {}


def test_a_failing_case_is_found(fuzz, monkeypatch):
    def fail(case, folder):
        raise ZeroDivisionError("as if")

    monkeypatch.setitem(fuzz.FAMILIES, "arguments", (fuzz.FAMILIES["arguments"][0], fail))
    result = fuzz.run_family("arguments", 5, 0)
    assert sum(result["failed"].values()) == result["cases"] >= 5
