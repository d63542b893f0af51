"""Every preset builds, and those of Table 3 have the paper's sizes."""

import pytest

from lediflow.training.builders import NETWORKS, count_parameters
from lediflow.training.config import load_config
from lediflow.training.config_files import preset_names
from lediflow.training.stages import STAGES

RGB = ("ffhq-256", "afhq-256", "lhq-256")
SDV = ("ffhq-256-sdv", "afhq-256-sdv", "lhq-256-sdv", "imagenet-256-sdv")


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds_and_says_what_it_needs(name):
    config = load_config(name)
    counted = count_parameters(config)
    described = {name for name, row in STAGES.items() if config.has(row) and not config.lacks(row)}
    assert counted.keys() == described
    assert {spec.name for spec in config.chosen(None)} <= counted.keys()
    assert config.description
    assert config.needs


@pytest.mark.parametrize(
    ("names", "exact", "millions"),
    [
        (RGB, {"flow": 159_871_410, "auxiliary": 37_059_808, "sampler": 16_977_840}, (160, 37, 17)),
        (SDV, {"flow": 153_822_881, "auxiliary": 35_798_848, "sampler": 16_977_840}, (154, 35, 17)),
    ],
)
def test_parameters_of_table_3(names, exact, millions):
    for name in names:
        counts = count_parameters(load_config(name))
        assert {k: counts[k] for k in exact} == exact
        # the paper rounds some numbers and cuts others (35.8 becomes 35)
        for count, paper in zip(
            (counts["flow"], counts["auxiliary"], counts["sampler"]), millions, strict=True
        ):
            assert abs(count / 1e6 - paper) < 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            RGB,
            {
                "sample_shape": (3, 256, 256),
                "flow": (4, (256, 512, 1024), (2, 2, 8), 1),
                "auxiliary": (4, (128, 256, 512, 512), (2, 2, 2, 2), 1),
                "batch": {"flow": 128, "auxiliary": 256, "sampler": 512},
            },
        ),
        (
            SDV,
            {
                "sample_shape": (4, 32, 32),
                "flow": (1, (512, 1024), (2, 8), 1),
                "auxiliary": (1, (256, 512, 512), (2, 2, 2), 1),
                "batch": {"flow": 64, "auxiliary": 128, "sampler": 256},
            },
        ),
    ],
)
def test_settings_of_table_3(names, expected):
    for name in names:
        config = load_config(name)
        assert config.sample_shape == expected["sample_shape"]
        for part in ("flow", "auxiliary"):
            c = getattr(config, part)
            assert (c.patch_size, c.widths, c.depths, c.global_levels) == expected[part]
            assert c.kernel_size == 7
        assert (config.flow.d_head, config.auxiliary.d_head, config.sampler.d_head) == (64, 16, 64)
        assert (config.flow.mapping_depth, config.flow.mapping_width) == (2, 768)
        assert (config.auxiliary.z_size, config.auxiliary.z_channels) == (8, 4)
        assert (config.sampler.widths, config.sampler.depths) == ((384,), (8,))
        assert config.training.precision == "bf16"
        for stage, batch in expected["batch"].items():
            settings = config.stage(stage)
            assert settings.batch_size == batch
            assert settings.betas == (0.9, 0.99)
            assert settings.learning_rate == 3e-4


def test_the_large_imagenet_preset_is_class_conditional_and_about_450_million():
    config = load_config("imagenet-256-sdv-large")
    assert config.data.classes == 1000
    assert abs(count_parameters(config)["flow"] / 1e6 - 450) < 10
    small = config.model_copy(update={"sampler": load_config("digits").sampler})
    assert NETWORKS["sampler"](small).classes() == 1000


def test_a_size_that_the_codec_cannot_bring_down_is_named():
    from lediflow.errors import UserError

    with pytest.raises(UserError, match=r"data.image_size 250 is not divisible by codec.factor 8"):
        count_parameters(load_config("ffhq-256-sdv", ["data.image_size=250"]))
