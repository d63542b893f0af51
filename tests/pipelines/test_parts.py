"""The parts of a pipeline, each against its definition, and the request that is made of them."""

import gc
import itertools
import weakref

import pytest
import torch
from conftest import TINY, random_network

from lediflow import FlowMatchingPipeline, LeDiFlowPipeline, UserError
from lediflow.conditions import Conditions
from lediflow.sources import image_noise
from lediflow.training.config import load_config

MIDPOINT = {"steps": 2, "solver": "midpoint"}


def networks(*parts, scale=0.4):
    """Random networks with ten classes; velocities are scaled down, for images inside of [-1, 1]."""
    config = load_config("digits", [*TINY, "data.classes=10"])
    found = {part: random_network(config, stage) for part, stage in parts}
    with torch.no_grad():
        for part, network in found.items():
            if part != "auxiliary":
                network.patch_out.proj.weight.mul_(scale)
    return found


@pytest.fixture
def pipe():
    pipeline = LeDiFlowPipeline(
        **networks(("auxiliary", "auxiliary"), ("flow", "flow"), ("sampler", "sampler"))
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def plain():
    pipeline = FlowMatchingPipeline(**networks(("flow", "baseline")))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def by_midpoint(network, x, told, steps=2):
    h = 1 / steps
    for i in range(steps):
        middle = x + h / 2 * network(x, torch.tensor(i * h), told)
        x = x + h * network(middle, torch.tensor((i + 0.5) * h), told)
    return x


LABELS = Conditions(label=torch.tensor([3, 0, 7]))


def test_encode_is_the_posterior(pipe):
    y = torch.rand(3, 1, 16, 16) * 2 - 1
    q, expected = pipe.encode(y), pipe.auxiliary.encode(y)
    assert torch.equal(q.mean, expected.mean) and torch.equal(q.log_var, expected.log_var)


def test_prior_is_decoded_from_z_as_it_is(pipe):
    z = torch.randn(3, 4, 4, 4)
    prior, expected = pipe.prior(z), pipe.auxiliary.decode(z)
    assert torch.equal(prior.mean, expected.mean) and torch.equal(prior.log_var, expected.log_var)


def test_sample_z_ends_in_the_units_of_the_prior(pipe):
    """The sampler's flow is on z with mean 0 and variance 1; what decodes is z = end * std + mean."""
    w = torch.randn(3, 4, 4, 4)
    solution = pipe.sample_z(w, LABELS, **MIDPOINT)
    standard = by_midpoint(pipe.sampler, w, LABELS)
    channels = torch.arange(1.0, 5).view(4, 1, 1)
    expected = standard * (0.5 + 0.4 * channels) + 0.3 * channels
    torch.testing.assert_close(solution.end, expected, rtol=1e-4, atol=1e-4)
    assert (expected - standard).abs().mean() > 0.3
    assert solution.nfe == 4
    assert pipe.sample_z(w, LABELS).nfe == 8, "four midpoint steps by default"
    other = pipe.sample_z(w, LABELS.drop("label"), **MIDPOINT).end
    assert (other - solution.end).abs().max() > 1e-2


def test_invert_z_leads_back_to_the_noise_that_z_was_made_of(pipe):
    w = torch.randn(3, 4, 4, 4)
    z = pipe.sample_z(w, LABELS, steps=64, solver="rk4").end
    back = pipe.invert_z(z, LABELS, steps=64, solver="rk4")
    torch.testing.assert_close(back.end, w, rtol=1e-3, atol=1e-3)
    assert back.nfe == 256 and (z - w).abs().mean() > 0.3
    assert pipe.invert_z(z, LABELS).nfe == 32
    # a z of its own: backwards along the sampler's field
    z, h = torch.randn(3, 4, 4, 4), -0.5
    state = (z - pipe.auxiliary.z_mean) / pipe.auxiliary.z_std
    for t in (1.0, 0.5):
        middle = state + h / 2 * pipe.sampler(state, torch.tensor(t), LABELS)
        state = state + h * pipe.sampler(middle, torch.tensor(t + h / 2), LABELS)
    torch.testing.assert_close(pipe.invert_z(z, LABELS, **MIDPOINT).end, state, rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="only goes from the source"):
        pipe.invert_z(z, LABELS, solver="mean")


def test_carry_follows_the_flow_at_z(pipe):
    x, z = torch.randn(3, 1, 16, 16), torch.randn(3, 4, 4, 4)
    solution = pipe.carry(x, z, LABELS, **MIDPOINT)
    torch.testing.assert_close(solution.end, by_midpoint(pipe.flow, x, LABELS.also(z=z)))
    assert solution.nfe == 4 and pipe.carry(x, z).nfe == 4
    without = pipe.carry(x, z, **MIDPOINT).end
    nothing = LABELS.also(z=z).drop("label")
    torch.testing.assert_close(without, by_midpoint(pipe.flow, x, nothing))
    assert (without - solution.end).abs().max() > 1e-2
    guided = pipe.carry(x, z, LABELS, steps=1, solver="euler", guidance=3.0)
    t = torch.tensor(0.0)
    none, given = pipe.flow(x, t, nothing), pipe.flow(x, t, LABELS.also(z=z))
    torch.testing.assert_close(guided.end, x + none + 3 * (given - none), rtol=1e-4, atol=1e-4)
    assert guided.nfe == 2


def test_parts_refuse_what_they_cannot_do(pipe):
    w, x = torch.randn(1, 4, 4, 4), torch.randn(1, 1, 16, 16)
    for call in (lambda: pipe.sample_z(w, solver="mean"), lambda: pipe.carry(x, w, solver="mean")):
        with pytest.raises(UserError, match="needs an average velocity"):
            call()
    for call in (lambda: pipe.sample_z(w, guidance=2.0), lambda: pipe.carry(x, w, guidance=2.0)):
        with pytest.raises(UserError, match="guidance 2 needs a class, cluster or text"):
            call()


REQUEST = {
    "seed": 4,
    "first_image": 2,
    "solver": "midpoint",
    "steps": 2,
    "latent_solver": "euler",
    "latent_steps": 3,
    "class_labels": [5, 1],
    "guidance": 1.5,
    "latent_guidance": 2.0,
}


def test_a_request_is_made_of_the_parts(pipe):
    """w -> z -> P_L -> x -> y, with the noise of each image's own index."""
    out = pipe(3, output_type="pt", **REQUEST)
    labels = pipe.labels_of(range(2, 5), [5, 1])
    assert labels["label"].tolist() == [5, 1, 5]
    w = image_noise((4, 4, 4), seed=4, indices=range(2, 5), stream="w")
    noise = image_noise((1, 16, 16), seed=4, indices=range(2, 5), stream="x")
    z = pipe.sample_z(w, labels, solver="euler", steps=3, guidance=2.0)
    prior = pipe.prior(z.end)
    x = prior.mean + prior.std * noise
    y = pipe.carry(x, z.end, labels, solver="midpoint", steps=2, guidance=1.5)
    torch.testing.assert_close(out.images, y.end.clamp(-1, 1), rtol=0, atol=1e-6)
    assert 0.3 < (y.end.abs() < 1).float().mean() < 1, "some pixels are clamped"
    assert (
        out.nfe == {"sampler": z.nfe, "decoder": 1, "flow": y.nfe} == {"sampler": 6, "decoder": 1, "flow": 8}
    )


def test_a_request_of_plain_flow_matching_is_one_field(plain):
    out = plain(3, output_type="pt", seed=4, first_image=2, **MIDPOINT)
    x = image_noise((1, 16, 16), seed=4, indices=range(2, 5), stream="x")
    end = by_midpoint(plain.flow, x, Conditions(label=torch.tensor([2, 3, 4])))
    torch.testing.assert_close(out.images, end.clamp(-1, 1), rtol=0, atol=1e-5)
    assert out.nfe == {"flow": 4}


# A request as a stream


@pytest.mark.parametrize("kind", ["pipe", "plain"])
def test_a_stream_is_the_request_batch_by_batch(kind, request):
    pipeline = request.getfixturevalue(kind)
    options = REQUEST if kind == "pipe" else {k: v for k, v in REQUEST.items() if "latent" not in k}
    whole = pipeline(7, batch_size=3, output_type="pt", **options)
    batches = list(pipeline.stream(7, batch_size=3, output_type="pt", **options))
    assert [len(batch.images) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([batch.images for batch in batches]), whole.images)
    assert all(batch.nfe == whole.nfe for batch in batches)
    pictures = [image for batch in pipeline.stream(4, batch_size=3, **options) for image in batch.images]
    assert [p.tobytes() for p in pictures] == [
        p.tobytes() for p in pipeline(4, batch_size=3, **options).images
    ]


def test_a_stream_makes_a_batch_when_it_is_asked_for_and_holds_no_other(pipe):
    """So a request may be of any length."""
    made = []
    hook = pipe.flow.register_forward_hook(lambda _m, inputs, _o: made.append(len(inputs[0])))
    stream = pipe.stream(10**9, batch_size=4, output_type="pt", steps=1, solver="euler", latent_steps=1)
    assert made == []
    handed = []
    for count, batch in enumerate(itertools.islice(stream, 4), 1):
        assert made == [4] * count
        handed.append(weakref.ref(batch.images))
        del batch
        gc.collect()
        assert [images() is None for images in handed[:-1]] == [True] * (count - 1), "the earlier are gone"
    hook.remove()


def test_between_the_batches_the_users_own_gradients_are_on(pipe):
    with torch.enable_grad():
        for batch in pipe.stream(2, batch_size=1, output_type="pt", steps=1, latent_steps=1):
            assert torch.is_grad_enabled() and not batch.images.requires_grad


def test_a_stream_refuses_bad_requests_before_it_makes_anything(pipe):
    for options, message in (({"steps": 0}, "steps must be"), ({"solver": "eular"}, "did you mean 'euler'")):
        with pytest.raises(UserError, match=message):
            next(pipe.stream(2, **options))
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        next(pipe.stream(2, batch_size=0))
