"""Pipelines: the same images from disk, seeds, batches, counted evaluations, and what cannot be loaded."""

import json
import shutil

import pytest
import torch
from conftest import weights

from lediflow import FlowMatchingPipeline, LeDiFlowPipeline, UserError, VelocityTransformer, load_pipeline
from lediflow.pictures import to_pil


@pytest.fixture(scope="module")
def pipe(tiny_run):
    pipeline = load_pipeline(tiny_run)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_classes(pipe, tiny_run):
    assert isinstance(pipe, LeDiFlowPipeline)
    assert isinstance(load_pipeline(tiny_run / "pipeline"), LeDiFlowPipeline)
    assert isinstance(load_pipeline(tiny_run / "baseline"), FlowMatchingPipeline)


def test_saved_and_loaded_pipelines_give_identical_images(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    again = LeDiFlowPipeline.from_pretrained(tmp_path / "copy")
    assert torch.equal(pipe(3, output_type="pt").images, again(3, output_type="pt").images)
    assert not [p for p in (tmp_path / "copy").rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_the_pipeline_holds_the_averaged_weights(pipe, tiny_run):
    assert torch.equal(pipe.flow.patch_in.weight, weights(tiny_run, "flow")["patch_in.weight"])
    assert torch.equal(pipe.auxiliary.z_std, weights(tiny_run, "auxiliary")["z_std"])


@pytest.mark.parametrize("folder", ["", "baseline"])
def test_image_i_depends_on_seed_and_i_only(folder, tiny_run):
    pipeline = load_pipeline(tiny_run / folder)
    whole = pipeline(5, seed=3, output_type="pt").images
    for size in (1, 2):
        torch.testing.assert_close(
            pipeline(5, seed=3, batch_size=size, output_type="pt").images, whole, rtol=0, atol=1e-5
        )
    torch.testing.assert_close(
        pipeline(2, seed=3, first_image=3, output_type="pt").images, whole[3:], rtol=0, atol=1e-5
    )
    assert not torch.allclose(pipeline(5, seed=4, output_type="pt").images, whole, atol=1e-3)


def test_global_random_state_is_left_alone(pipe):
    before = torch.get_rng_state()
    pipe(2, steps=1, latent_steps=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "nfe"),
    [
        ({"steps": 2, "latent_steps": 4}, {"sampler": 8, "decoder": 1, "flow": 4}),
        ({"steps": 1, "latent_steps": 2, "solver": "heun3"}, {"sampler": 6, "decoder": 1, "flow": 3}),
        (
            {"steps": 1, "latent_steps": 1, "solver": "euler", "latent_solver": "rk4"},
            {"sampler": 4, "decoder": 1, "flow": 1},
        ),
    ],
)
def test_evaluations_are_counted_as_they_happen(pipe, options, nfe):
    calls = {"sampler": 0, "flow": 0}
    hooks = [
        getattr(pipe, name).register_forward_hook(
            lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)
        )
        for name in calls
    ]
    out = pipe(2, **options)
    for hook in hooks:
        hook.remove()
    assert out.nfe == nfe
    assert calls == {name: nfe[name] for name in calls}


def test_images_are_pil_or_tensors_in_range(pipe):
    out = pipe(2, output_type="pt").images
    assert out.shape == (2, 1, 16, 16)
    assert out.min() >= -1
    assert out.max() <= 1
    pil = pipe(2).images
    assert pil[0].mode == "L"
    assert pil[0].size == (16, 16)
    assert to_pil(torch.tensor([[[[-1.0, 1.0]]]]))[0].tobytes() == bytes([0, 255])


def test_bf16_stays_near_fp32(pipe):
    exact = pipe(4, output_type="pt").images
    rounded = pipe(4, output_type="pt", dtype=torch.bfloat16).images
    assert 0 < (exact - rounded).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"latent_steps": 0}, "steps must be at least 1"),
        ({"solver": "eular"}, "did you mean 'euler'"),
        ({"num_images": 0}, "num_images must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"output_type": "np"}, "'pil' or 'pt'"),
    ],
)
def test_bad_requests(pipe, options, message):
    with pytest.raises(UserError, match=message):
        pipe(**options)


def test_what_cannot_be_loaded_is_named(tiny_run, tmp_path):
    with pytest.raises(UserError, match="no model"):
        load_pipeline(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no trained pipeline"):
        load_pipeline(tmp_path)
    broken = shutil.copytree(tiny_run / "pipeline", tmp_path / "broken")
    weights = broken / "flow" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot load"):
        load_pipeline(broken)
    weights.unlink()
    torch.save(load_pipeline(tiny_run).flow.state_dict(), weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="cannot load"):  # pickled weights are not an alternative
        load_pipeline(broken)
    with pytest.raises(OSError, match="safetensors"):
        VelocityTransformer.from_pretrained(broken / "flow")
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(UserError, match="is a StableDiffusionPipeline"):
        load_pipeline(broken)


@pytest.mark.parametrize("saved", [{}, {"format": 1}, {"format": 3}])
@pytest.mark.parametrize("folder", ["pipeline", "baseline/pipeline"])
def test_a_pipeline_of_another_format_is_refused_with_one_sentence(folder, saved, tiny_run, tmp_path):
    old = shutil.copytree(tiny_run / folder, tmp_path / "old")
    index = json.loads((old / "model_index.json").read_text())
    assert index.pop("format") == 2
    (old / "model_index.json").write_text(json.dumps({**index, **saved}))
    message = (
        "old was saved by another version of lediflow, in a format that this one does not read; train again"
    )
    with pytest.raises(UserError, match=message) as refusal:
        load_pipeline(old)
    assert "\n" not in str(refusal.value)
