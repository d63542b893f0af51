import numpy as np
import pytest

from lediflow.app.inside import inside
from lediflow.app.models import Models
from lediflow.errors import UserError


def test_the_path_ends_at_the_picture_of_the_seed(app_models, app_limits):
    found = inside(app_models, app_limits, seed=4, steps=3)
    assert len(found.path) == len(found.baseline) == 4
    assert [caption for _, caption in found.prior] == ["mu", "sigma", "x ~ P_L"]
    assert len(found.z) == app_models.pipeline.auxiliary.z_shape[0]
    made = app_models.pipeline(1, seed=4, steps=3).images[0]
    assert np.abs(np.asarray(found.path[-1][0], int) - np.asarray(made, int)).max() <= 1
    assert np.array_equal(np.asarray(found.path[0][0]), np.asarray(found.prior[2][0]))
    assert "From the learned prior: 6 evaluations" in found.told and "From noise: 6" in found.told


def test_without_a_baseline_there_is_nothing_beside_it(app_models, app_limits):
    alone = Models(app_models.name, app_models.pipeline, app_models.weights)
    found = inside(alone, app_limits, seed=0, steps=1)
    assert found.baseline == [] and "From noise" not in found.told
    with pytest.raises(UserError, match="steps must be from 1 to 8, not 9"):
        inside(alone, app_limits, seed=0, steps=9)
