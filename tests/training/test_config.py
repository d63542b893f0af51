"""Settings: what is refused, by which name, and with which advice."""

import pytest
import yaml

from lediflow.errors import UserError
from lediflow.training.config import Config, differences, load_config, load_run_config
from lediflow.training.config_files import preset_names


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_builds_and_survives_yaml(name, tmp_path):
    from lediflow.training.builders import count_parameters

    config = load_config(name)
    assert config.description
    assert config.needs
    counts = count_parameters(config)
    assert counts.pop("clusters", 0) == 0 and min(counts.values()) > 0
    (tmp_path / "copy.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "copy.yaml") == config


def test_the_baseline_has_the_flow_network_size():
    from lediflow.training.builders import count_parameters

    for name in preset_names():
        counts = count_parameters(load_config(name))
        if "flow" in counts:
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


# One config that extends another


def test_a_config_that_extends_another_says_only_what_differs(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "extends: digits\nflow: {widths: [64]}\ntraining: {baseline: {steps: 7}, stages: [baseline]}\n"
    )
    overrides = ["flow.widths=[64]", "training.baseline.steps=7", "training.stages=[baseline]"]
    assert load_config(tmp_path / "mine.yaml") == load_config("digits", overrides)
    assert load_config(tmp_path / "mine.yaml", ["flow.widths=[32]"]).flow.widths == (32,)
    assert load_config(tmp_path / "mine.yaml").description == load_config("digits").description


def test_the_extended_config_may_lie_beside_and_extend_another(tmp_path):
    (tmp_path / "digits").mkdir()  # a folder of a preset's name is no config
    (tmp_path / "base.yaml").write_text("extends: digits\ndata: {flip: true, classes: 10}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\ndata: {classes: 0}\ndescription: mine\n")
    config = load_config(tmp_path / "mine.yaml")
    assert config == load_config("digits", ["data.flip=true", "description=mine"])
    assert "extends" not in yaml.safe_load(config.to_yaml())


def test_a_section_can_be_taken_away(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: ffhq-256-sdv\ncodec: null\n")
    assert load_config("ffhq-256-sdv").codec is not None
    assert load_config(tmp_path / "mine.yaml").codec is None


def test_what_cannot_be_extended_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(UserError, match="extends runs in a circle: .*a.yaml.* -> .*b.yaml"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "own.yaml").write_text("extends: own.yaml\n")
    with pytest.raises(UserError, match="circle"):
        load_config(tmp_path / "own.yaml")
    for base in ("{}", "[digits]", "7", "''"):
        (tmp_path / "odd.yaml").write_text(f"extends: {base}\n")
        with pytest.raises(UserError, match="extends must name a preset|unknown preset"):
            load_config(tmp_path / "odd.yaml")
    (tmp_path / "lost.yaml").write_text("extends: digit\n")
    with pytest.raises(UserError, match="unknown preset 'digit'.*did you mean 'digits'"):
        load_config(tmp_path / "lost.yaml")
    (tmp_path / "wrong.yaml").write_text("extends: digits\nflow: {widht: [8]}\n")
    with pytest.raises(UserError, match=r"unknown key 'flow.widht' \(did you mean 'flow.widths'\?\)"):
        load_config(tmp_path / "wrong.yaml")


# Runs of another format


def test_the_config_of_a_run_says_its_format(tmp_path):
    config = load_config("digits", ["flow.widths=[64]"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert yaml.safe_load(config.to_yaml())["format"] == 2
    assert load_run_config(tmp_path) == config


@pytest.mark.parametrize("line", ["", "format: 1\n", "format: 3\n"])
def test_a_run_of_another_format_is_refused_with_one_sentence(line, tmp_path):
    from lediflow.training.run import train

    text = load_config("digits").to_yaml().replace("format: 2\n", line)
    (tmp_path / "config.yaml").write_text(text)
    message = f"{tmp_path} was made by another version of lediflow.*train again, into another --output"
    with pytest.raises(UserError, match=message) as refusal:
        load_run_config(tmp_path)
    assert "\n" not in str(refusal.value)
    # the command that would resume it leaves it as it is
    step = tmp_path / "auxiliary" / "checkpoints" / "step-6"
    step.mkdir(parents=True)
    (step / "state.json").write_text("{}")
    with pytest.raises(UserError, match="made by another version"):
        train(load_config("digits"), tmp_path, device="cpu")
    assert (tmp_path / "config.yaml").read_text() == text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.image_size=30", "size 30x30 is not divisible by|cannot be reached"),
        ("auxiliary.z_size=3", "z of 3x3"),
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
