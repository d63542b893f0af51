"""What benchmarks/table1.py reports; how fast anything is, is not asserted."""

from types import SimpleNamespace

import pytest
import table1

from lediflow.evaluation.speed import pipeline_of
from tests.conftest import TINY


def test_every_network_and_every_row_of_table_1_is_there():
    options = {"dtype": "fp32", "compile": "none", "attention": None, "codec": None, "device": "cpu"}
    a = SimpleNamespace(
        model="digits", settings=TINY, average_velocity=True, batch_size=2, repeats=1, **options
    )
    report = table1.report_of(a)
    assert set(report["networks"]) == {"sampler", "decoder", "flow"}
    assert all(n["gflop"] >= 0 and n["ms_per_image"] > 0 for n in report["networks"].values())
    rows = {(row["model"], row["solver"]): row for row in report["sampling"]}
    assert {key: row["nfe"] for key, row in rows.items()} == {
        ("flow matching", "midpoint"): {"flow": 16},
        ("LeDiFlow", "midpoint"): {"sampler": 8, "decoder": 1, "flow": 4},
        ("flow matching", "heun3"): {"flow": 24},
        ("LeDiFlow", "heun3"): {"sampler": 6, "decoder": 1, "flow": 3},
        ("LeDiFlow", "mean"): {"sampler": 1, "decoder": 1, "flow": 1},
    }
    one, eight = rows["LeDiFlow", "mean"], rows["flow matching", "midpoint"]
    assert report["speedup"]["mean"] == pytest.approx(eight["ms_per_image"] / one["ms_per_image"], abs=0.01)
    for row in report["sampling"]:
        for name, ms in row["ms"].items():
            one = report["networks"][name]["ms_per_image"]
            assert ms == pytest.approx(row["nfe"][name] * one, abs=0.02)


def test_the_baseline_is_the_same_network_without_z():
    pipeline = pipeline_of("digits", TINY, average_velocity=True)
    baseline = table1.baseline_of(pipeline)
    assert baseline.flow.config.widths == pipeline.flow.config.widths
    assert "z" in pipeline.flow.config.conditions and "z" not in baseline.flow.config.conditions
    assert not baseline.flow.average_velocity
