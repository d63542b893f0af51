"""Settings: what is refused, by which name, and with which advice."""

import pytest
import yaml

from lediflow.errors import UserError
from lediflow.training.config import Config, differences, load_config, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_builds_and_survives_yaml(name, tmp_path):
    from lediflow.training.run import check_networks

    config = load_config(name)
    assert config.description
    assert config.needs
    assert min(check_networks(config).values()) > 0
    (tmp_path / "copy.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "copy.yaml") == config


def test_the_baseline_has_the_flow_network_size():
    from lediflow.training.run import check_networks

    for name in preset_names():
        counts = check_networks(load_config(name))
        assert counts["baseline"] == pytest.approx(counts["flow"], rel=0.01)


def test_overrides_are_typed():
    config = load_config(
        "digits", ["training.auxiliary.beta=5e-1", "flow.widths=[64]", "data.flip=true", "data.train='a b'"]
    )
    assert config.training.auxiliary.beta == 0.5
    assert config.flow.widths == (64,)
    assert config.data.flip is True
    assert config.data.train == "a b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("flow.widht=[64]", r"unknown key 'flow.widht' \(did you mean 'flow.widths'\?\)"),
        ("training.flow.stepz=3", "did you mean 'training.flow.steps'"),
        ("training.flow.steps=0", "training.flow.steps: .*greater than or equal to 1, got 0"),
        ("training.flow.steps=many", "training.flow.steps: .*valid integer"),
        ("training.precision=fp12", "training.precision: .*'auto', 'fp32', 'bf16' or 'fp16'"),
        ("data.channels=2", "data.channels"),
        ("training.flow.steps", "write it as key.subkey=value"),
        ("data.train.x=1", "'train' is a value"),
        ("a: b=[", "not a valid value|unknown key"),
    ],
)
def test_wrong_settings_are_refused_by_name(override, message):
    with pytest.raises(UserError, match=message):
        load_config("digits", [override])


def test_unknown_presets_and_files(tmp_path):
    with pytest.raises(UserError, match="unknown preset 'digit'.*did you mean 'digits'"):
        load_config("digit")
    with pytest.raises(UserError, match="no config file"):
        load_config("nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(UserError, match="must hold settings"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "empty.yaml").write_text("description: x")
    with pytest.raises(UserError, match="missing key 'auxiliary'"):
        load_config(tmp_path / "empty.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.image_size=30", "size 30x30 is not divisible by|cannot be reached"),
        ("auxiliary.latent_size=3", "z of 3x3"),
        ("flow.d_head=48", "not divisible by d_head 48"),
        ("flow.kernel_size=4", "kernel_size must be odd, not 4"),
        ("flow.widths=[64,64]", "one width for each depth"),
    ],
)
def test_impossible_sizes_are_refused_before_training(override, message, tmp_path):
    from lediflow.training.run import train

    with pytest.raises(UserError, match=message):
        train(load_config("digits", [override]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_differences_name_what_makes_another_run():
    a, b = load_config("digits"), load_config("digits", ["flow.widths=[64]", "training.flow.steps=7"])
    assert differences(a, b) == {"flow.widths": ([128], [64])}


def test_every_key_has_a_home_in_the_yaml():
    tree = yaml.safe_load(load_config("digits").to_yaml())
    assert set(tree) == set(Config.model_fields)
