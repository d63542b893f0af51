"""The diagonal Gaussian against hand-computed values and torch.distributions."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from lediflow.gaussian import DiagonalGaussian, elbo_loss


@pytest.fixture
def gaussian():
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64)
    log_var = torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64)
    return DiagonalGaussian(mean, log_var)


def test_nll_by_hand():
    # sigma = 2, y one sigma from the mean: 0.5 (1 + ln 4 + ln 2 pi)
    d = DiagonalGaussian(torch.zeros(1), torch.full((1,), math.log(4.0)))
    assert d.nll(torch.tensor([2.0])).item() == pytest.approx(0.5 * (1 + math.log(4) + math.log(2 * math.pi)))


def test_nll_and_kl_agree_with_torch(gaussian):
    y = torch.linspace(-2, 2, gaussian.mean.numel(), dtype=torch.float64).view_as(gaussian.mean)
    reference = Normal(gaussian.mean, gaussian.std)
    torch.testing.assert_close(gaussian.nll(y), -reference.log_prob(y))
    standard = Normal(torch.zeros_like(y), torch.ones_like(y))
    torch.testing.assert_close(gaussian.kl(), kl_divergence(reference, standard))


def test_nll_is_least_at_the_true_variance():
    y = torch.tensor([0.3, -0.3])
    log_var = torch.zeros(2, requires_grad=True)
    best = DiagonalGaussian(torch.zeros(2), torch.full((2,), math.log(0.09))).nll(y).sum()
    grad = torch.autograd.grad(DiagonalGaussian(torch.zeros(2), log_var).nll(y).sum(), log_var)[0]
    assert (grad > 0).all(), "a variance that is too large must be pushed down"
    assert best < DiagonalGaussian(torch.zeros(2), log_var).nll(y).sum()


def test_sample_statistics_and_seed():
    d = DiagonalGaussian(torch.full((200_000,), 1.5), torch.full((200_000,), math.log(0.25)))
    x = d.sample(torch.Generator().manual_seed(0))
    assert x.mean().item() == pytest.approx(1.5, abs=0.01)
    assert x.std().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(x, d.sample(torch.Generator().manual_seed(0)))


def test_sampling_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    DiagonalGaussian(torch.zeros(4), torch.zeros(4)).sample(torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_gradients_in_float64(gaussian):
    mean, log_var = (u.detach().requires_grad_() for u in (gaussian.mean[0, 0], gaussian.log_var[0, 0]))
    y = torch.ones_like(mean)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def everything(m, s):
        d = DiagonalGaussian(m, s)
        return d.nll(y), d.kl(), d.at(noise)

    assert torch.autograd.gradcheck(everything, (mean, log_var))


def test_elbo_unit_does_not_change_with_size():
    """beta = 1 is the negative ELBO per image element, whatever the sizes (FACTS: not beta per latent)."""
    prior = DiagonalGaussian(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8))
    posterior = DiagonalGaussian(torch.ones(2, 4, 2, 2), torch.zeros(2, 4, 2, 2))
    y = torch.ones(2, 3, 8, 8)
    nll = 0.5 * (1 + math.log(2 * math.pi))
    kl = 16 * 0.5 / (3 * 64)
    assert elbo_loss(prior, y, posterior, beta=1.0).item() == pytest.approx(nll + kl)
    assert elbo_loss(prior, y, posterior, beta=0.5).item() == pytest.approx(nll + kl / 2)


def test_at_power_1_all_errors_of_the_mean_weigh_the_same():
    """d/dmu of sigma^2 nll / mean(sigma^2) is (mu - y) / mean(sigma^2); at 0 it is (mu - y) / sigma^2."""
    log_var = torch.tensor([[-6.0, 0.0, 1.0, 2.0]])
    posterior = DiagonalGaussian(torch.zeros(1, 2), torch.zeros(1, 2))
    for power in (0.0, 0.5, 1.0):
        mean = torch.full((1, 4), 0.5, requires_grad=True)
        prior = DiagonalGaussian(mean, log_var.clone().requires_grad_())
        loss = elbo_loss(prior, torch.zeros(1, 4), posterior, variance_power=power)
        loss.backward()
        weight = (power * log_var).exp() / (power * log_var).exp().mean()
        torch.testing.assert_close(mean.grad, 0.5 * weight * (-log_var).exp() / 4)
        # sigma is learned as before: no gradient through the weight
        d_log_var = 0.5 * (1 - 0.25 * (-log_var).exp()) * weight / 4
        torch.testing.assert_close(prior.log_var.grad, d_log_var)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ"):
        DiagonalGaussian(torch.zeros(3), torch.zeros(4))
