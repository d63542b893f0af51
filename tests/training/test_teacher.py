"""What a refining stage learns of guidance, against the formula."""

import pytest
import torch
from conftest import batch_of, context_of, step_noise

from lediflow.training.stages import STAGES
from lediflow.training.teacher import Teacher

BOTH = [
    "clusters.count=3",
    "clusters.networks=[sampler, flow]",
    "data.classes=10",
    "training.meanflow.guidance=[1,3]",
    "training.meanflow.autoguidance=[0.5,2]",
]


@pytest.fixture
def taught(digits):
    """A teacher of both kinds, with the conditions of a batch, a point and its time."""

    def make(*settings):
        context = context_of(digits, *BOTH, *settings)
        from lediflow.training.builders import build_stage

        stage, batch = build_stage("meanflow", context), batch_of(digits)
        teacher = Teacher(STAGES["meanflow"], context)
        with torch.no_grad():
            pairs = stage.coupling.pairs(batch, step_noise())
        conditions = teacher.strengths(pairs.conditions, step_noise())
        return teacher, pairs, conditions, torch.rand(len(pairs.x))

    return make


def velocities(teacher, point, t, conditions):
    """v, v without labels, and that of the weak network."""
    told = conditions.only(["label", "cluster", "z"])
    with torch.no_grad():
        given, none = (
            teacher.network(point, t, told),
            teacher.network(point, t, told.drop(["label", "cluster"])),
        )
        return given, none, teacher.weak(point, t, told)


def test_strengths_are_drawn_on_their_ranges_for_each_image(taught):
    _, _, conditions, _ = taught()
    assert conditions["guidance"].min() >= 1 and conditions["guidance"].max() <= 3
    assert conditions["autoguidance"].min() >= 0.5 and conditions["autoguidance"].max() <= 2
    assert len(conditions["guidance"].unique()) > 4
    assert torch.equal(taught()[2]["guidance"], conditions["guidance"]), "by the step's noise alone"


def test_the_velocity_to_learn_is_that_of_the_pairs_and_the_teachers_guidance(taught):
    teacher, pairs, conditions, t = taught()
    point, v = pairs.y, pairs.y - pairs.x
    given, none, weak = velocities(teacher, point, t, conditions)
    g, w = (conditions[name].view(-1, 1, 1, 1) - 1 for name in ("guidance", "autoguidance"))
    more = g * (given - none) + w * (given - weak)
    assert more.abs().mean() > 1e-2
    torch.testing.assert_close(teacher.velocity(point, t, conditions, v), v + more, rtol=1e-4, atol=1e-4)


def test_without_guidance_it_is_the_pairs_own(digits):
    teacher = Teacher(STAGES["meanflow"], context_of(digits))
    v = torch.randn(2, 1, 16, 16)
    assert teacher.network is None and teacher.velocity(v, torch.zeros(2), None, v) is v
