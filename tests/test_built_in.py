"""Models that come with the package."""

import shutil

import pytest
import torch

from lediflow import LeDiFlowPipeline, models
from lediflow.errors import UserError
from lediflow.pipelines.load import load_pipeline


@pytest.fixture
def packaged(tiny_run, tmp_path, monkeypatch):
    """The tiny run's pipeline as a model of the package, and another folder to work in."""
    monkeypatch.setattr(models, "FOLDER", tmp_path / "models")
    shutil.copytree(tiny_run / "pipeline", tmp_path / "models" / "tiny")
    (tmp_path / "desk").mkdir()
    monkeypatch.chdir(tmp_path / "desk")
    return tmp_path


def made(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(2, seed=1, output_type="pt").images


def test_a_built_in_name_loads_as_its_folder_does(packaged, tiny_run):
    expected = made(load_pipeline(tiny_run))
    assert torch.equal(made(load_pipeline("tiny")), expected)
    assert torch.equal(made(LeDiFlowPipeline.from_pretrained("tiny")), expected)


def test_a_folder_with_a_pipeline_goes_before_and_another_does_not(packaged):
    (packaged / "desk" / "tiny").mkdir()  # of pictures, say
    assert models.built_in("tiny") == packaged / "models" / "tiny"
    (packaged / "desk" / "tiny" / "model_index.json").write_text("{}")
    assert models.built_in("tiny") is None


def test_an_unknown_name_tells_which_there_are(packaged):
    with pytest.raises(UserError, match=r"no model tinny.* comes with lediflow \(tiny\)"):
        load_pipeline("tinny")
