"""The table of stages: every name in it stands for something, and everything else follows from it."""

import subprocess
import sys

import pytest

from lediflow.errors import UserError
from lediflow.training.builders import NETWORKS, OBJECTIVES, count_parameters
from lediflow.training.config import config_class, load_config
from lediflow.training.couplings import COUPLINGS
from lediflow.training.settings import Section
from lediflow.training.stages import STAGES, check_stage, in_order

GUIDED = [
    "clusters.count=3",
    "clusters.networks=[sampler,flow,baseline]",
    *(
        f"training.{stage}.{kind}=[1,2]"
        for stage in ("meanflow", "sampler_meanflow", "baseline_meanflow", "distill")
        for kind in ("guidance", "autoguidance")
    ),
]


@pytest.mark.parametrize("name", STAGES)
def test_every_name_in_a_row_resolves(name):
    row = STAGES[name]
    assert row.name == name and row.learns
    assert row.network in NETWORKS
    assert COUPLINGS[row.coupling].name == row.coupling
    assert row.objective in OBJECTIVES
    assert issubclass(row.settings, Section)


@pytest.mark.parametrize("name", STAGES)
def test_what_a_row_relies_on_is_trained_before_it(name):
    row, order = STAGES[name], list(STAGES)
    unguided = ["clusters.count=0", "training.sampler_meanflow.guidance=null"]
    plain, guided = load_config("digits", unguided), load_config("digits", GUIDED)
    starts = [row.starts_from] if row.starts_from else []
    assert set(plain.relies_on(row)) == {*row.needs, *starts}
    weak = [row.weak] if row.weak else []
    clusters = ["auxiliary", "clusters"] if row.network in ("sampler", "flow", "baseline") else []
    assert set(guided.relies_on(row)) == {*row.needs, *starts, *weak, *clusters}
    for needed in guided.relies_on(row):
        assert order.index(needed) < order.index(name)
    if row.weak:
        assert STAGES[row.weak].network == row.network and STAGES[row.weak].coupling == row.coupling
    if row.starts_from:
        assert STAGES[row.starts_from].network == row.network, "the weights fit"
        assert STAGES[row.starts_from].coupling == row.coupling


def test_a_coupling_that_asks_for_a_trained_network_has_it_among_the_needs(digits):
    from conftest import context_of

    from lediflow.training.builders import build_stage

    seen = set()
    for name, row in [*STAGES.items(), *STAGES.items()]:
        context, asked = context_of(digits, *(GUIDED if name in seen else ["clusters.count=3"])), []
        seen.add(name)
        trained = context.trained
        context.trained = lambda stage, asked=asked, trained=trained: asked.append(stage) or trained(stage)
        build_stage(name, context)
        assert set(asked) == set(context.config.relies_on(row)), name


def test_every_stage_has_its_section_with_its_own_settings():
    training = config_class().model_fields["training"].annotation
    for row in STAGES.values():
        assert training.model_fields[row.section].annotation is row.settings
        assert training.model_fields[row.section].description == row.learns
        assert load_config("digits").stage(row.name) == getattr(load_config("digits").training, row.section)
    assert STAGES["sampler-meanflow"].section == "sampler_meanflow"


def test_parameters_are_counted_for_every_stage():
    config = load_config("digits", ["clusters.count=16"])
    counts = count_parameters(config)
    described = [name for name, row in STAGES.items() if not config.lacks(row)]
    assert list(counts) == described and counts.pop("clusters") == 0 and min(counts.values()) > 0
    assert "upsampler" in STAGES and "upsampler" not in described
    for name in ("meanflow", "distill"):
        assert counts[name] > counts["flow"], "the interval is told too"


def test_stages_are_trained_in_the_order_of_the_table():
    assert [row.name for row in in_order(["baseline", "flow", "auxiliary"])] == [
        "auxiliary",
        "flow",
        "baseline",
    ]
    with pytest.raises(UserError, match=r"unknown stage 'flwo' \(did you mean 'flow'\?\); choose from auxi"):
        in_order(["flow", "flwo"])
    with pytest.raises(UserError, match="unknown stage 'x'"):
        check_stage("x")
    with pytest.raises(UserError, match="unknown stage 'flwo'"):
        load_config("digits", ["training.stages=[flwo]"])


def test_the_table_needs_no_torch():
    code = "import sys, lediflow.training.stages; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
