"""What each coupling gives for a batch, and what its previews show, against their definitions."""

import itertools

import pytest
import torch
from conftest import CPU, batch_of, context_of, digits_data, step_noise

from lediflow.gaussian import DiagonalGaussian
from lediflow.sources import image_noise
from lediflow.training.couplings import COUPLINGS, PREVIEW_IMAGES, Context, Coupling, Posteriors

STAGE = {"images": "auxiliary", "gaussian": "baseline", "learned-prior": "flow", "latent": "sampler"}
CLASSES = "data.classes=10"
INDEPENDENT = "training.sampler.coupling=independent"  # which is not how the digits preset has it
HELD = {"in memory": 1.0, "as asked": 0.0}  # GB for the images


def coupling_of(data, name, *settings):
    context = context_of(data, *settings)
    return COUPLINGS[name](context, context.config.stage(STAGE[name]))


def pairs_of(coupling, batch, **noise):
    with torch.no_grad():
        return coupling.pairs(batch, step_noise(len(batch["index"]), **noise))


def z_of(coupling, batch):
    """z = mean + sigma * noise of q(z|y), of the very images in the batch, as eq. 5 samples it."""
    with torch.no_grad():
        posterior = coupling.auxiliary.encode(batch["image"])
    noise = step_noise(len(batch["index"])).normal((4, 4, 4), "z")
    return posterior.mean + (posterior.log_var / 2).exp() * noise, posterior


def test_every_coupling_is_defined_here():
    upsamplers = {name for name in COUPLINGS if name.startswith("upsampled")}
    assert set(STAGE) == set(COUPLINGS) - upsamplers


def test_images_have_no_source(digits):
    coupling, batch = coupling_of(digits, "images", CLASSES), batch_of(digits)
    y, told = coupling.targets(batch, step_noise())
    assert torch.equal(y, batch["image"]) and not told and not coupling.tells_labels
    assert coupling.preview(None) == []


def test_gaussian_pairs_standard_noise_with_images(digits):
    batch = batch_of(digits)
    pairs = pairs_of(coupling_of(digits, "gaussian"), batch)
    assert torch.equal(pairs.x, step_noise().normal((1, 16, 16), "x"))
    assert torch.equal(pairs.y, batch["image"])
    assert not pairs.conditions and pairs.sigma is None


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("flip", [False, True], ids=["as they are", "some mirrored"])
def test_z_is_a_sample_of_the_posterior_of_the_image_in_the_batch(held, flip):
    """Whether images are encoded once for all or each time, and whether they are mirrored or not."""
    data = digits_data(flip=flip, cache_gb=HELD[held])
    assert data.cached == (held == "in memory")
    batch = batch_of(data, 12)
    assert set(batch["flipped"].tolist()) == {False, flip}
    z, posterior = z_of(flow := coupling_of(data, "learned-prior"), batch)
    assert (z - posterior.mean).abs().mean() > 0.1, "the mean is something else"
    if flip:
        _, other = z_of(flow, {**batch, "image": batch["image"].flip(-1)})
        assert (posterior.mean - other.mean).abs().amax((1, 2, 3)).min() > 0.1, "and so is the mirror image's"
    torch.testing.assert_close(pairs_of(flow, batch).conditions["z"], z, rtol=1e-4, atol=1e-4)
    sampler = coupling_of(data, "latent")
    expected = (z - sampler.auxiliary.z_mean) / sampler.auxiliary.z_std
    torch.testing.assert_close(pairs_of(sampler, batch).y, expected, rtol=1e-4, atol=1e-4)


def test_learned_prior_pairs_its_sample_at_z_with_the_image(digits):
    """Eq. 3: x = mu(z) + sigma(z) * noise."""
    coupling, batch = coupling_of(digits, "learned-prior"), batch_of(digits)
    pairs = pairs_of(coupling, batch)
    with torch.no_grad():
        prior = coupling.auxiliary.decode(z_of(coupling, batch)[0])
    sigma = (prior.log_var / 2).exp()
    assert torch.equal(pairs.y, batch["image"])
    torch.testing.assert_close(pairs.sigma, sigma, rtol=1e-4, atol=1e-5)
    expected = prior.mean + sigma * step_noise().normal((1, 16, 16), "x")
    torch.testing.assert_close(pairs.x, expected, rtol=1e-4, atol=1e-4)
    assert sigma.std() > 0.01, "it varies"
    assert list(pairs.conditions) == ["z"] and not pairs.conditions.dropped


def test_latent_pairs_standard_noise_with_standardised_z(digits):
    coupling, batch = coupling_of(digits, "latent", INDEPENDENT), batch_of(digits)
    pairs = pairs_of(coupling, batch)
    assert torch.equal(pairs.x, step_noise().normal((4, 4, 4), "w"))
    z = pairs.y * (0.5 + 0.4 * torch.arange(1.0, 5)).view(4, 1, 1) + 0.3 * torch.arange(1.0, 5).view(4, 1, 1)
    torch.testing.assert_close(z, z_of(coupling, batch)[0], rtol=1e-4, atol=1e-4)
    assert not pairs.conditions and pairs.sigma is None


@pytest.mark.parametrize("name", ["gaussian", "learned-prior", "latent"])
def test_classes_are_told_where_the_run_has_them(name, digits):
    batch = batch_of(digits)
    told = pairs_of(coupling_of(digits, name, CLASSES), batch).conditions
    assert torch.equal(told["label"], batch["label"])
    assert "label" not in pairs_of(coupling_of(digits, name), batch).conditions


@pytest.mark.parametrize("name", ["gaussian", "latent"])
def test_optimal_transport_deals_out_the_same_noise_along_the_shortest_paths(name, digits):
    """Of a batch's noise no other order comes nearer to its targets; nothing else changes."""
    batch = batch_of(digits, 5)
    choice = f"training.{STAGE[name]}.coupling="
    independent = pairs_of(coupling_of(digits, name, choice + "independent"), batch)
    ordered = pairs_of(coupling_of(digits, name, choice + "optimal-transport"), batch)
    assert torch.equal(ordered.y, independent.y)

    def cost(order):
        return (independent.y - independent.x[list(order)]).square().sum().item()

    best = min(itertools.permutations(range(5)), key=cost)
    assert list(best) != list(range(5)), "there is something to gain"
    assert torch.equal(ordered.x, independent.x[list(best)])


def test_images_in_memory_are_encoded_once(digits):
    class Counting(torch.nn.Module):
        calls = 0

        def encode(self, y):
            self.calls += 1
            return DiagonalGaussian(y, -y)

    batch = batch_of(digits)
    for data, before, after in ((digits, 10, 10), (digits_data(cache_gb=0.0), 0, 1)):
        counting = Counting()
        posteriors = Posteriors(counting, data, CPU)
        assert counting.calls == before, "297 digits are ten batches of 32"
        posterior = posteriors.of(batch)
        assert counting.calls == after
        assert torch.equal(posterior.mean, batch["image"]) and torch.equal(posterior.log_var, -batch["image"])


def test_finished_networks_are_loaded_once_and_frozen(digits):
    loaded = []

    def trained(stage):
        loaded.append(stage)
        return torch.nn.Linear(2, 2).train()

    context = Context(context_of(digits).config, digits, CPU, trained)
    network = context.network("auxiliary")
    assert context.network("auxiliary") is network and loaded == ["auxiliary"]
    assert not network.training and not any(p.requires_grad for p in network.parameters())


# Previews


class Carry:
    """Moves x by the number of steps, and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, x, conditions, steps):
        self.asked.append((x, conditions, steps))
        return x + steps


def previewed(coupling):
    carry = Carry()
    rows = coupling.preview(carry)
    assert all(len(row) == PREVIEW_IMAGES for row in rows)
    again = coupling.preview(Carry())
    assert all(torch.equal(a, b) for a, b in zip(rows, again, strict=True)), "always from the same noise"
    return rows, carry.asked


def preview_noise(shape, stream):
    return image_noise(shape, seed=0, indices=range(PREVIEW_IMAGES), stream=stream)


def test_the_preview_of_gaussian_is_where_its_noise_goes(digits):
    rows, asked = previewed(coupling_of(digits, "gaussian", CLASSES))
    assert [steps for _, _, steps in asked] == [1, 2, 4, 8]
    x = asked[0][0]
    assert torch.equal(x, preview_noise((1, 16, 16), "x"))
    assert all(torch.equal(given, x) for given, _, _ in asked)
    assert all(torch.equal(row, x + steps) for row, (_, _, steps) in zip(rows, asked, strict=True))
    for _, told, _ in asked:
        assert told["label"].tolist() == list(range(8)), "the classes in turn"


def test_the_preview_of_learned_prior_shows_the_images_mu_and_where_the_samples_go(digits):
    coupling = coupling_of(digits, "learned-prior", CLASSES)
    rows, asked = previewed(coupling)
    y = digits.first(8)
    with torch.no_grad():
        z = coupling.auxiliary.encode(y).mean
        prior = coupling.auxiliary.decode(z)
    assert torch.equal(rows[0], y)
    torch.testing.assert_close(rows[1], prior.mean)
    x = asked[0][0]
    noise = preview_noise((1, 16, 16), "x")
    torch.testing.assert_close(x, prior.mean + prior.std * noise)
    assert [steps for _, _, steps in asked] == [1, 2, 4]
    for row, (given, told, steps) in zip(rows[2:], asked, strict=True):
        assert torch.equal(given, x) and torch.equal(row, x + steps)
        torch.testing.assert_close(told["z"], z)
        assert torch.equal(told["label"], digits.first_labels(8))


def test_the_preview_of_latent_is_mu_at_z_in_its_own_units(digits):
    coupling = coupling_of(digits, "latent", CLASSES)
    rows, asked = previewed(coupling)
    assert [steps for _, _, steps in asked] == [1, 2, 4]
    w, auxiliary = asked[0][0], coupling.auxiliary
    assert torch.equal(w, preview_noise((4, 4, 4), "w"))
    for row, (_, told, steps) in zip(rows, asked, strict=True):
        assert told["label"].tolist() == list(range(8))
        with torch.no_grad():
            expected = auxiliary.decode((w + steps) * auxiliary.z_std + auxiliary.z_mean).mean
            as_carried = auxiliary.decode(w + steps).mean
        torch.testing.assert_close(row, expected)
        assert (expected - as_carried).abs().mean() > 0.01


def test_a_coupling_of_ones_own_needs_targets_and_a_preview(digits):
    """The rest is there: noise from its stream, classes, the pairs."""

    class Half(Coupling):
        name, stream = "half", "h"

        def targets(self, batch, noise):
            return batch["image"] / 2, self.labels(batch["label"])

        def source(self, conditions, noise):
            return 3 * noise + 1, torch.full_like(noise, 3.0)

        def preview(self, carry):
            return []

    context = context_of(digits, CLASSES)
    batch = batch_of(digits)
    pairs = pairs_of(Half(context, context.config.stage("flow")), batch)
    assert torch.equal(pairs.x, 3 * step_noise().normal((1, 16, 16), "h") + 1)
    assert torch.equal(pairs.y, batch["image"] / 2)
    assert torch.equal(pairs.conditions["label"], batch["label"]) and (pairs.sigma == 3).all()
