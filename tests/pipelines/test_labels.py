"""Classes in pipelines: taken in turn, by name or index, guided, and refused where there are none."""

import numpy as np
import pytest
import torch
from conftest import TINY, randomized

from lediflow import LeDiFlowPipeline, UserError, load_pipeline
from lediflow.conditions import Conditions
from lediflow.pipelines.labels import check_labels
from lediflow.sources import image_noise
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


@torch.no_grad()
def test_guided_images_are_those_of_the_guided_fields(pipe):
    """Both parts of the way are guided, each by its own number, by the class of each image."""
    out = pipe(4, seed=2, first_image=5, solver="euler", steps=1, latent_solver="euler", latent_steps=1,
               guidance=2.5, latent_guidance=0.5, output_type="pt")  # fmt: skip
    labels = Conditions(label=torch.arange(5, 9))
    draw = {"seed": 2, "indices": range(5, 9)}
    w, noise = image_noise((4, 4, 4), stream="w", **draw), image_noise((1, 16, 16), stream="x", **draw)
    t = torch.zeros(4)

    def guided(network, x, told, guidance):
        none = network(x, t, told.drop("label"))
        return x + none + guidance * (network(x, t, told) - none)

    z = guided(pipe.sampler, w, labels, 0.5) * pipe.auxiliary.z_std + pipe.auxiliary.z_mean
    prior = pipe.auxiliary.decode(z)
    x = prior.mean + prior.std * noise
    expected = guided(pipe.flow, x, labels.also(z=z), 2.5)
    torch.testing.assert_close(out.images, expected.clamp(-1, 1), rtol=1e-3, atol=1e-3)
    assert (expected.abs() < 1).float().mean() > 0.2, "not all is clamped"


def test_labels_of_a_request_are_by_the_index_of_the_image(pipe, tiny_run):
    assert pipe.labels_of(range(8, 12))["label"].tolist() == [8, 9, 0, 1]
    assert pipe.labels_of(range(3, 6), ["7", 2])["label"].tolist() == [2, 7, 2]
    assert not load_pipeline(tiny_run).labels_of(range(3))


def test_a_model_with_classes_is_diagnosed_and_evaluated(pipe):
    """Real images are reconstructed without a class; sampled latents take the classes in turn."""
    from lediflow.diagnosis.measurements import prior_curvature, sampled_latents
    from lediflow.evaluation.measure import reconstruct
    from lediflow.evaluation.request import Request

    z = sampled_latents(pipe, 3, steps=1, seed=0, batch_size=2)
    assert z.shape == (3, 4, 4, 4)
    assert prior_curvature(pipe, z, seed=0, batch_size=2)["length"] > 0
    request = Request("euler", steps=1, latent_steps=1, num_images=3, seed=0, batch_size=2, dtype="fp32")
    assert reconstruct(pipe, torch.zeros(3, 1, 16, 16), request).shape == (3, 1, 16, 16)


@pytest.mark.parametrize(
    "labels",
    [np.int64(7), np.array([7, 2]), torch.tensor(7), torch.tensor([7, 2]), (7, np.int32(2)), "7"],
    ids=repr,
)
def test_classes_of_any_integer_type_are_taken(labels, pipe):
    found = check_labels(labels, 10, None)
    assert found in ([7], [7, 2])
    assert all(type(label) is int for label in found)
    pipe(1, class_labels=labels, output_type="pt")


@pytest.mark.parametrize("label", [1.5, None, [None], Ellipsis], ids=repr)
def test_what_is_no_class_is_refused(label):
    if label is None:
        assert check_labels(label, 3, None) == [0, 1, 2]
        return
    with pytest.raises(UserError, match="a class is a name or a whole number"):
        check_labels(label, 3, None)


def test_classes_without_images_are_not_made_unless_asked_for():
    """Only those that had training images have a name."""
    assert check_labels(None, 4, {"0": "a", "3": "d"}) == [0, 3]
    assert check_labels([1, "d"], 4, {"0": "a", "3": "d"}) == [1, 3]
    assert check_labels(None, 3, None) == [0, 1, 2]


def test_the_classes_of_a_run_are_those_with_images(digits):
    from lediflow.training.inputs import taught_classes

    class Few:
        labels, class_names = torch.tensor([2, 0, 2]), ["a", "b", "c"]

    assert taught_classes(Few()) == {"0": "a", "2": "c"}
    assert taught_classes(digits) == {str(i): str(i) for i in range(10)}
