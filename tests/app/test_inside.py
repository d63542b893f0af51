from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lediflow.app.inside import inside
from lediflow.app.models import Models
from lediflow.app.upsample import enlarge
from lediflow.errors import UserError
from lediflow.networks.velocity import VelocityTransformer
from lediflow.pipelines.upsample import FlowUpsamplePipeline


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


def test_enlarging(app_models, app_session, app_limits, photo):
    with pytest.raises(UserError, match="started without a model that enlarges"):
        enlarge(app_models, app_session, app_limits, str(photo), steps=1, seed=0)
    network = VelocityTransformer(
        16, 1, 2, (16,), (1,), d_head=8, mapping_width=16, mapping_depth=1,
        conditions={
            "image": {"embedder": "grid", "channels": 1, "size": 16},
            "noise_level": {"embedder": "scalar"},
        },
    )  # fmt: skip
    both = replace(app_models, upsampler=FlowUpsamplePipeline(network, scale=4))
    edited = enlarge(both, app_session, app_limits, str(photo), steps=2, seed=0)
    assert Image.open(edited.made[0].path).size == (160, 120)
    large = app_session.keep(Image.new("L", (1600, 1200)), None, "")
    with pytest.raises(UserError, match="would be 6,400 x 4,800 pixels, and at most 17 million"):
        enlarge(both, app_session, app_limits, str(large.path), steps=2, seed=0)
