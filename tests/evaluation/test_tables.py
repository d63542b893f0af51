from __future__ import annotations

import pytest

from lediflow.evaluation.plots import Point
from lediflow.evaluation.tables import markdown_table, quality_table, speed_table, verdict, verdicts


def test_table_is_aligned():
    table = markdown_table(["model", "steps", "FD"], [["FM", 1, "41.0"], ["a|b", 16, "0.8"]])
    assert table.splitlines() == [
        "| model | steps |   FD |",
        "| ----- | ----: | ---: |",
        "| FM    |     1 | 41.0 |",
        "| a\\|b  |    16 |  0.8 |",
    ]


def test_table_without_rows_and_with_a_short_row():
    assert markdown_table(["a", "b"], []) == "| a   | b   |\n| --- | --- |"
    with pytest.raises(ValueError, match="2 cells"):
        markdown_table(["a", "b"], [["only one"]])


def test_verdict_names_the_fastest_that_is_as_good_as_the_baselines_best():
    baseline = [Point(1, 1.0, 9.0), Point(8, 8.0, 3.0)]
    says = verdict([Point(1, 1.5, 4.0), Point(2, 2.0, 2.5), Point(4, 4.0, 2.0)], baseline)
    assert says.startswith("LeDiFlow with 2 steps (2.5)")
    assert "in 2.00 instead of 8.00 ms per image: 4.0 times the speed" in says
    assert "does not reach the best of flow matching (3 at 8 steps)" in verdict(
        [Point(1, 1.5, 4.0)], baseline
    )


def test_verdict_names_a_cheaper_baseline_that_is_as_good_for_all_one_knows():
    ours = [Point(1, 2.0, 1.0)]
    baseline = [Point(2, 3.0, 2.2, 1.9, 2.5), Point(8, 8.0, 2.0, 1.7, 2.3)]
    assert "within the interval of its best already with 2 steps (2.2) in 3.00 ms" in verdict(ours, baseline)
    apart = [Point(2, 3.0, 2.4, 2.1, 2.7), baseline[1]]
    assert "interval" not in verdict(ours, apart)


def _row(model, kind, steps, ms, value):
    return {
        "model": model,
        "kind": kind,
        "solver": "heun3",
        "steps": steps,
        "latent_solver": None,
        "latent_steps": None,
        "nfe": {"flow": 3 * steps},
        "ms_per_image": {"total": ms, "flow": ms, "other": 0.0},
        "images_per_second": 1000 / ms,
        "metrics": {"f/mmd": {"value": value, "low": value - 0.5, "high": value + 0.5}},
    }


def test_tables_and_verdicts_of_given_rows():
    results = {
        "models": [{"name": n, "shape": [3, 8, 8]} for n in ("a", "b")],
        "rows": [
            _row("a", "LeDiFlowPipeline", 1, 2.0, 3.0),
            _row("a", "LeDiFlowPipeline", 2, 4.0, 1.0),
            _row("b", "FlowMatchingPipeline", 4, 12.0, 2.0),
        ],
        "real": [{"shape": [3, 8, 8], "floor": {}, "floor_images": 0}],
    }
    (says,) = verdicts(results, "f/mmd")
    assert "LeDiFlow with 2 heun3 steps (1)" in says
    assert "in 4.00 instead of 12.00 ms per image: 3.0 times the speed" in says
    assert "| a     | heun3  |     2 | 6 flow      |       4.00 |" in markdown_table(
        *speed_table(results, "f/mmd")
    )
    assert "1 [0.5, 1.5]" in markdown_table(*quality_table(results))
    results["rows"][0] |= {"latent_solver": "mean", "latent_steps": 1}
    assert "| a     | heun3  |     1 | 1 mean step    |" in markdown_table(*speed_table(results, "f/mmd"))
    assert "| b     | heun3  |     4 |                |" in markdown_table(*quality_table(results))
    results["models"][1]["shape"] = [3, 16, 16]
    assert verdicts(results, "f/mmd") == [], "models of another size do not compare"
