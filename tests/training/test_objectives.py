"""What each objective asks of a network, against its definition and from the same draws."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, batch_of, context_of, random_network, randomized, stage_of, step_noise

from lediflow import flow
from lediflow.conditions import Conditions
from lediflow.errors import UserError
from lediflow.networks.conditions import example_conditions
from lediflow.networks.hourglass import pair
from lediflow.sources import BatchNoise
from lediflow.training.builders import NETWORKS, OBJECTIVES
from lediflow.training.couplings import COUPLINGS, Coupling
from lediflow.training.objectives import Objective
from lediflow.training.stages import STAGES

CLASSES = "data.classes=10"
REFINING = [name for name, row in STAGES.items() if row.starts_from]


def random_stage(digits, name, *settings):
    """A stage whose network has random weights: a fresh one predicts 0, which hides most mistakes."""
    stage = stage_of(digits, name, *settings)
    randomized(stage.network)
    return stage


def loss_of(stage, batch, model=None):
    return stage.loss(model or stage.network, batch, step_noise(len(batch["index"])))


def drawn(stage, batch):
    with torch.no_grad():
        return stage.coupling.pairs(batch, step_noise(len(batch["index"])))


class Recording:
    """A network that keeps what it was asked."""

    def __init__(self, network):
        self.network, self.asked = network, []

    def __call__(self, *arguments):
        self.asked.append(arguments)
        return self.network(*arguments)


def test_every_objective_has_a_name_of_its_own_and_a_stage():
    assert {row.objective for row in STAGES.values()} == set(OBJECTIVES)


def test_initial_weights_depend_on_the_seed_and_the_stage_alone(digits):
    def weights(*settings, name="baseline"):
        torch.manual_seed(len(settings))
        return stage_of(digits, name, *settings).network.patch_in.weight

    assert torch.equal(weights(), weights("training.seed=0"))
    assert not torch.equal(weights(), weights("training.seed=1"))
    assert not torch.equal(weights()[:, :4], weights(name="flow")[:, :4])
    before = torch.get_rng_state()
    stage = stage_of(digits, "baseline")
    assert torch.equal(torch.get_rng_state(), before) and stage.network.training


# The ELBO


@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_elbo_is_its_two_terms(beta, digits):
    """Eq. 4 and 5: -log P_L(y | z) for each element, and the KL of the posterior spread over them."""
    stage = random_stage(digits, "auxiliary", f"training.auxiliary.beta={beta}")
    batch = batch_of(digits)
    loss, metrics = loss_of(stage, batch)
    y, network = batch["image"], stage.network
    q = network.encode(y)
    posterior = torch.distributions.Normal(q.mean, (q.log_var / 2).exp())
    p = network.decode(posterior.mean + posterior.stddev * step_noise().normal((4, 4, 4), "z"))
    prior = torch.distributions.Normal(p.mean, (p.log_var / 2).exp())
    standard = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    kl = torch.distributions.kl_divergence(posterior, standard).sum((1, 2, 3)).mean()
    vgl = -prior.log_prob(y).mean()
    torch.testing.assert_close(loss, vgl + beta * kl / 256)
    assert loss.requires_grad
    expected = {
        "vgl": vgl,
        "kl_per_image": kl,
        "sigma": prior.stddev.mean(),
        # E (y - x)^2 for x ~ P_L
        "transport_cost": ((y - prior.mean) ** 2 + prior.variance).mean(),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value.detach())


def test_elbo_ends_with_the_statistics_of_z_over_the_training_set(digits):
    stage = random_stage(digits, "auxiliary")
    stage.finish()
    with torch.no_grad():
        q = stage.network.encode(digits.first(len(digits)))
        z = q.at(torch.randn(20, *q.mean.shape)).flatten(0, 1)
        standard = stage.network.standardize(z)
    assert z.std((0, 2, 3)).sub(1).abs().min() > 0.02, "it is not standardised as it comes"
    torch.testing.assert_close(standard.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.02)
    torch.testing.assert_close(standard.std((0, 2, 3)), torch.ones(4), rtol=0, atol=0.02)

    raw = random_stage(digits, "auxiliary", "training.auxiliary.standardize_z=false")
    raw.finish()
    assert (raw.network.z_mean == 0).all() and (raw.network.z_std == 1).all()


def test_the_preview_of_elbo_is_images_mu_and_a_sample(digits):
    stage = random_stage(digits, "auxiliary")
    with torch.no_grad():
        y, mu, sample = stage.preview()
        prior = stage.network.decode(stage.network.encode(digits.first(8)).mean)
    assert torch.equal(y, digits.first(8))
    torch.testing.assert_close(mu, prior.mean)
    torch.testing.assert_close(sample, prior.mean + prior.std * stage.coupling.preview_noise(8))


# Matching


@pytest.mark.parametrize("coupling", ["independent", "optimal-transport"])
@pytest.mark.parametrize("law", ["uniform", "logit-normal"])
@pytest.mark.parametrize("name", ["sampler", "baseline"])
def test_matching_is_eq_2(name, law, coupling, digits):
    """Mean of (v(phi_t) - (y - x))^2 at times of the law that was asked for."""
    settings = [f"training.{name}.times={law}", f"training.{name}.coupling={coupling}"]
    stage = random_stage(digits, name, *settings)
    batch, model = batch_of(digits), Recording(stage.network)
    loss, metrics = loss_of(stage, batch, model)
    pairs, t = drawn(stage, batch), step_noise().times(law)
    ((point, told, _),) = model.asked
    assert torch.equal(told, t)
    torch.testing.assert_close(point, (1 - t.view(-1, 1, 1, 1)) * pairs.x + t.view(-1, 1, 1, 1) * pairs.y)
    errors = stage.network(point, t, pairs.conditions) - (pairs.y - pairs.x)
    torch.testing.assert_close(loss, errors.square().mean())
    assert metrics == {} and loss.requires_grad


@pytest.mark.parametrize("weighted", [True, False])
def test_matching_from_the_learned_prior_is_eq_6_or_eq_2(weighted, digits):
    stage = random_stage(digits, "flow", f"training.flow.importance_weighting={weighted}")
    batch = batch_of(digits)
    loss, metrics = loss_of(stage, batch)
    pairs, t = drawn(stage, batch), step_noise().times()
    v = stage.network(flow.phi(pairs.x, pairs.y, t), t, pairs.conditions)
    errors = (v - (pairs.y - pairs.x)).square()
    plain, divided = errors.mean(), (errors / pairs.sigma).mean()
    assert (plain - divided).abs() > 0.1 * plain
    torch.testing.assert_close(loss, divided if weighted else plain)
    assert metrics == ({"unweighted": plain} if weighted else {})


class Sharp(Coupling):
    """Images of one pixel, from sources of which one is all but certain."""

    name = "sharp"
    SIGMA = torch.tensor([1e-6, 1e-3, 0.5, 2.0]).view(4, 1, 1, 1)

    def targets(self, batch, noise):
        return torch.ones(4, 1, 1, 1), Conditions()

    def source(self, conditions, noise):
        return torch.zeros(4, 1, 1, 1), self.SIGMA

    def preview(self, carry):
        return []


class Still(torch.nn.Module):
    """A velocity of 0, so that all errors are 1."""

    average_velocity, config = True, SimpleNamespace(in_channels=1, sample_size=1, conditions={})

    def forward(self, x, t, conditions=None, r=None):
        return 0 * x


@pytest.mark.parametrize("name", ["flow", "meanflow"])
def test_the_weight_of_a_pixel_is_at_most_1000(name, digits):
    """ "Clip the divider" below eq. 6: 1 / max(sigma, 1e-3)."""
    row = STAGES[name]
    context = context_of(digits, "training.meanflow.error_power=0")
    stage = OBJECTIVES[row.objective](row, context, Sharp, lambda config, average_velocity: Still())
    loss, _ = stage.loss(stage.network, {"index": torch.arange(4)}, step_noise(4))
    assert loss.item() == pytest.approx((1000 + 1000 + 2 + 0.5) / 4)


# What all objectives do with labels


def test_labels_are_left_out_as_often_as_asked(digits):
    stage = stage_of(digits, "baseline", CLASSES, "training.label_dropout=0.25")
    labels = Conditions(label=torch.arange(4000) % 10)
    noise = BatchNoise(0, batch_size=4000, positions=range(4000), device=CPU)
    given = stage.given(labels, noise)
    assert torch.equal(given["label"], labels["label"])
    assert given.dropped["label"].float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert not labels.dropped, "the coupling's own stay whole"
    parts = [BatchNoise(0, batch_size=4000, positions=r, device=CPU) for r in (range(999), range(999, 4000))]
    apart = [stage.given(labels.rows(slice(p.positions.start, p.positions.stop)), p) for p in parts]
    assert torch.equal(Conditions.cat(apart).dropped["label"], given.dropped["label"])
    assert stage.given(Conditions(), noise) == Conditions()


@pytest.mark.parametrize("name", ["flow", "sampler", "baseline", "meanflow", "distill"])
def test_a_loss_leaves_the_same_labels_out_and_nothing_else(name, digits, tmp_path):
    stage = random_stage(digits, name, CLASSES, "training.label_dropout=0.4", "training.distill.pairs=8")
    if name == "distill":
        stage.make_pairs(tmp_path, "a")
        stage.load_pairs()
    model = Recording(stage.network)
    loss_of(stage, batch_of(digits, 16), model)
    (asked,) = model.asked
    told = asked[2]
    assert torch.equal(told.dropped["label"], step_noise(16).uniform("label") < 0.4)
    assert 0 < told.dropped["label"].sum() < 16
    assert list(told.dropped) == ["label"], "z is always told"


# The average velocity


@pytest.mark.parametrize("name", REFINING)
def test_a_refined_network_starts_as_its_teacher(name, digits):
    stage = stage_of(digits, name)
    teacher = random_network(stage.config, STAGES[name].starts_from)
    shape = stage.network.config.in_channels, *pair(stage.network.config.sample_size)
    x, t = torch.randn(2, *shape), torch.tensor([0.2, 0.7])
    told = example_conditions(teacher.config.conditions, 2)
    r = torch.ones(2)
    expected = teacher(x, t, told, r if teacher.average_velocity else None)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(stage.network(x, t, told, r), expected)
    assert stage.network.training and all(p.requires_grad for p in stage.network.parameters())


def test_another_network_cannot_be_started_from(digits):
    stage = stage_of(digits, "distill")
    with pytest.raises(UserError, match="stage distill cannot start from flow: embedders"):
        stage.start_from(random_network(context_of(digits, CLASSES).config, "flow"))


def correction_of(stage, point, v, t, r, told):
    return flow.average_velocity_correction(lambda x, t: stage.network(x, t, told, r), point, v, t, r)


@pytest.mark.parametrize("name", ["meanflow", "sampler-meanflow", "baseline-meanflow"])
def test_meanflow_learns_v_plus_the_correction(name, digits):
    """The loss against its definition, from the same draws."""
    stage = random_stage(digits, name, f"training.{STAGES[name].section}.error_power=0")
    batch = batch_of(digits)
    pairs = drawn(stage, batch)
    t, r, moving = flow.draw_intervals(
        step_noise().times(), step_noise().uniform("r"), range(8), equal_share=0.5, end_share=0.25
    )
    v, point = flow.velocity(pairs.x, pairs.y), flow.phi(pairs.x, pairs.y, t)
    correction = correction_of(stage, point, v, t, r, pairs.conditions)
    u = stage.network(point, t, pairs.conditions, r)
    loss, metrics = loss_of(stage, batch)
    errors = (u - v - correction).square()
    expected = (errors if pairs.sigma is None else errors / pairs.sigma.clamp_min(1e-3)).mean()
    torch.testing.assert_close(loss, expected)
    rms = (correction[moving].square().mean() / v[moving].square().mean()).sqrt()
    assert rms > 1e-2
    torch.testing.assert_close(metrics["correction"], rms)
    torch.testing.assert_close(metrics["error"], expected.detach())


def test_large_errors_count_less_by_the_power_that_was_asked_for(digits):
    """MeanFlow's robust loss, on the mean error of each image."""
    batch = batch_of(digits)
    stage = random_stage(digits, "baseline-meanflow", "training.baseline_meanflow.error_power=0.75")
    plain = random_stage(digits, "baseline-meanflow", "training.baseline_meanflow.error_power=0")
    model = Recording(plain.network)
    mean, _ = loss_of(plain, batch, model)
    ((point, t, told, r),) = model.asked
    pairs = drawn(plain, batch)
    v = flow.velocity(pairs.x, pairs.y)
    target = v + correction_of(plain, point, v, t, r, told)
    errors = (plain.network(point, t, told, r) - target).square().mean((1, 2, 3))
    torch.testing.assert_close(mean, errors.mean())
    torch.testing.assert_close(loss_of(stage, batch)[0], (errors / (errors + 1e-3) ** 0.75).mean())


@pytest.mark.slow
def test_a_compiled_correction_is_the_same(digits):
    """The derivative in forward mode has a compiled graph of its own, without breaks."""
    losses = {}
    for how in ("none", "model"):
        stage = random_stage(digits, "meanflow", f"training.compile={how}")
        torch._dynamo.utils.counters.clear()
        losses[how], metrics = loss_of(stage, batch_of(digits))
        assert metrics["correction"] > 1e-3
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] == 1
    assert not counted["graph_break"]
    torch.testing.assert_close(losses["model"], losses["none"], rtol=1e-4, atol=1e-4)


def test_the_target_has_no_gradient(digits):
    """Only u is learned: the gradient is that of a regression on a constant."""
    whole = ["error_power=0", "equal_share=0", "end_share=1"]
    stage = random_stage(
        digits, "baseline-meanflow", *(f"training.baseline_meanflow.{setting}" for setting in whole)
    )
    batch = batch_of(digits)
    loss, _ = loss_of(stage, batch)
    loss.backward()
    pairs, t = drawn(stage, batch), step_noise().times()
    point, v, r = flow.phi(pairs.x, pairs.y, t), flow.velocity(pairs.x, pairs.y), torch.ones(8)
    target = v + correction_of(stage, point, v, t, r, Conditions())
    parameter = stage.network.patch_out.proj.weight
    u = stage.network(point, t, Conditions(), r)
    expected = torch.autograd.grad((u - target).square().mean(), parameter)
    torch.testing.assert_close(parameter.grad, expected[0])


# Previews


@pytest.mark.parametrize(("name", "solver"), [("flow", "midpoint"), ("meanflow", "mean")])
def test_previews_carry_with_the_network_as_it_is(name, solver, digits):
    stage = random_stage(digits, name)
    x, told = torch.randn(3, 1, 16, 16), Conditions(z=torch.randn(3, 4, 4, 4))
    with torch.no_grad():
        if solver == "mean":
            half, whole = torch.tensor(0.5), torch.tensor(1.0)
            expected = x + 0.5 * stage.network(x, torch.tensor(0.0), told, half)
            expected = expected + 0.5 * stage.network(expected, half, told, whole)
        else:
            expected = x
            for t in (0.0, 0.5):
                middle = expected + 0.25 * stage.network(expected, torch.tensor(t), told)
                expected = expected + 0.5 * stage.network(middle, torch.tensor(t + 0.25), told)
        found = stage.carry(x, told, 2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - x).abs().mean() > 0.1
    with torch.no_grad():
        assert all(row.shape == (8, 1, 16, 16) and row.isfinite().all() for row in stage.preview())


def test_an_objective_of_ones_own_is_a_loss(digits):
    class Mass(Objective):
        def loss(self, model, batch, noise):
            return model(batch["image"], torch.zeros(len(batch["index"]))).mean(), {}

    stage = Mass(STAGES["baseline"], context_of(digits), COUPLINGS["gaussian"], NETWORKS["baseline"])
    randomized(stage.network)
    loss, _ = loss_of(stage, batch_of(digits))
    assert math.isfinite(loss.item()) and loss.requires_grad
    assert len(stage.preview()) == 4
