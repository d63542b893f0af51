"""Classes in pipelines, and classifier-free guidance against its formula."""

import pytest
import torch
from conftest import TINY, randomized

from lediflow import LeDiFlowPipeline, UserError, VelocityTransformer, load_pipeline
from lediflow.pipelines.guidance import check_labels, velocity_field
from lediflow.training.config import load_config
from lediflow.training.run import train


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    config = load_config("digits", [*TINY, "data.classes=10"])
    run = train(config, tmp_path_factory.mktemp("runs") / "classes", device="cpu")
    pipeline = load_pipeline(run)
    pipeline.set_progress_bar_config(disable=True)
    # six steps of training move a class hardly at all
    randomized(pipeline.flow)
    randomized(pipeline.sampler)
    return pipeline


def test_class_names_travel_with_the_model(pipe, tmp_path):
    assert pipe.class_names == [str(i) for i in range(10)]
    pipe.save_pretrained(tmp_path / "copy")
    assert LeDiFlowPipeline.from_pretrained(tmp_path / "copy").class_names == pipe.class_names


def test_no_class_has_a_row_of_its_own():
    settings = {"widths": (16,), "depths": (1,), "d_head": 8, "mapping_width": 16, "mapping_depth": 1}
    network = randomized(VelocityTransformer(8, 1, 2, num_classes=3, **settings))
    assert network.class_embedding.weight.shape == (4, 16)
    x, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(0.3)
    v = network(x[:1].expand(4, -1, -1, -1), t, None, torch.arange(4))
    assert all((v[i] - v[j]).abs().max() > 1e-4 for i in range(4) for j in range(i))
    assert "class_embedding.weight" not in VelocityTransformer(8, 1, 2, **settings).state_dict()


def test_guidance_is_its_formula_in_one_doubled_batch():
    network = randomized(
        VelocityTransformer(
            8, 1, 2, num_classes=3, latent_channels=2, latent_size=2,
            widths=(16,), depths=(1,), d_head=8, mapping_width=16, mapping_depth=1,
        )
    )  # fmt: skip
    g = torch.Generator().manual_seed(1)
    x, z = torch.randn(3, 1, 8, 8, generator=g), torch.randn(3, 2, 2, 2, generator=g)
    t, labels = torch.tensor(0.4), torch.tensor([2, 0, 1])
    with torch.no_grad():
        with_class = network(x, t, z, labels)
        none = network(x, t, z, torch.full_like(labels, 3))
        calls = []
        hook = network.register_forward_hook(lambda _m, inputs, _o: calls.append(len(inputs[0])))
        for guidance, evaluations, rows in ((1.0, 1, 3), (2.5, 2, 6), (0.0, 2, 6)):
            field, count = velocity_field(network, z, labels, guidance)
            expected = none + guidance * (with_class - none)
            torch.testing.assert_close(field(t, x), expected, rtol=1e-4, atol=1e-5)
            assert count == evaluations
            assert calls.pop() == rows
            assert not calls
        hook.remove()


def test_evaluations_count_the_guided_twice(pipe):
    def nfe(**options):
        return pipe(2, steps=2, latent_steps=3, **options).nfe

    assert nfe() == {"sampler": 6, "decoder": 1, "flow": 4}
    assert nfe(guidance=2.0) == {"sampler": 6, "decoder": 1, "flow": 8}
    assert nfe(latent_guidance=2.0) == {"sampler": 12, "decoder": 1, "flow": 4}


def images(pipe, count=4, **options):
    return pipe(count, steps=1, latent_steps=1, output_type="pt", **options).images


def test_classes_are_taken_in_turn_by_index_or_name(pipe):
    turns = images(pipe, 12)
    torch.testing.assert_close(images(pipe, 1, first_image=11, class_labels=1), turns[11:], rtol=0, atol=1e-5)
    torch.testing.assert_close(images(pipe, 2, first_image=10), turns[10:], rtol=0, atol=1e-5)
    assert torch.equal(images(pipe, class_labels=["7", 2]), images(pipe, class_labels=[7, 2, 7, 2]))
    assert not torch.allclose(images(pipe, class_labels=7), images(pipe, class_labels=2), atol=1e-3)
    assert not torch.allclose(images(pipe, guidance=3.0), images(pipe), atol=1e-3)
    assert not torch.allclose(images(pipe, latent_guidance=3.0), images(pipe), atol=1e-3)


def test_wrong_classes_are_refused(pipe, tiny_run):
    names = {"0": "daisy", "1": "tulip"}
    assert check_labels(["tulip", "0", 1], 2, names) == [1, 0, 1]
    for label, message in (
        ("tulp", r"unknown class 'tulp' \(did you mean 'tulip'\?\); choose from daisy, tulip"),
        (2, "class 2 is not one of this model's 0 to 1"),
        (-1, "class -1 is not one"),
        ([], "at least one class"),
    ):
        with pytest.raises(UserError, match=message):
            check_labels(label, 2, names)
    plain = load_pipeline(tiny_run)
    with pytest.raises(UserError, match="trained without classes"):
        plain(1, class_labels=1)
    with pytest.raises(UserError, match="guidance 2 needs a model with classes"):
        plain(1, guidance=2.0)


def test_labels_are_left_out_as_often_as_asked():
    from lediflow.data.images import ImageData
    from lediflow.sources import BatchNoise
    from lediflow.training.refine import build_stage

    config = load_config("digits", [*TINY, "data.classes=10", "training.label_dropout=0.25"])
    device = torch.device("cpu")
    stage = build_stage("baseline", config, ImageData("digits", image_size=16, channels=1), device, None)
    labels = torch.arange(4000) % 10
    noise = BatchNoise(0, batch_size=4000, positions=range(4000), device=device)
    given = stage.training_labels({"label": labels}, noise)
    dropped = given == 10
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(given[~dropped], labels[~dropped])


def test_a_model_with_classes_is_diagnosed_and_evaluated(pipe):
    """Real images are reconstructed without a class; sampled latents take the classes in turn."""
    from lediflow.evaluation.diagnostics import prior_curvature, sampled_latents
    from lediflow.evaluation.measure import Request, reconstruct

    z = sampled_latents(pipe, 3, steps=1, seed=0, batch_size=2)
    assert z.shape == (3, 4, 4, 4)
    assert prior_curvature(pipe, z, seed=0, batch_size=2)["length"] > 0
    request = Request("euler", steps=1, latent_steps=1, num_images=3, seed=0, batch_size=2, dtype="fp32")
    assert reconstruct(pipe, torch.zeros(3, 1, 16, 16), request).shape == (3, 1, 16, 16)
