"""VelocityUNet: Table 8's sizes, conditions, other sizes, the average velocity; and UpsamplingPrior."""

import math

import pytest
import torch
from conftest import randomized

from lediflow.conditions import Conditions
from lediflow.errors import UserError
from lediflow.flow import average_velocity_correction
from lediflow.networks.attention import forward_mode
from lediflow.networks.positions import rope_table
from lediflow.networks.unet import VelocityUNet
from lediflow.networks.upsampling_prior import UpsamplingPrior
from lediflow.networks.velocity import VelocityTransformer

SMALL = {
    "base_width": 32,
    "multipliers": (1, 2),
    "depth": 1,
    "attention_factors": (2,),
    "heads": 2,
    "d_head": 8,
}


def told_of(size, batch=2):
    return Conditions(image=torch.randn(batch, 3, *size), noise_level=torch.linspace(100, 300, batch))


def small(**changes):
    conditions = {
        "image": {"embedder": "grid", "channels": 3, "size": 8},
        "noise_level": {"embedder": "scalar", "largest": 999},
    }
    return VelocityUNet(8, 3, conditions=conditions, **{**SMALL, **changes})


@pytest.mark.parametrize(
    ("multipliers", "exact", "paper"),
    [((1, 2, 3, 4), 112_722_052, 113e6), ((1, 2, 4, 8), 305_806_340, 306e6)],
)
def test_parameters_of_table_8(multipliers, exact, paper):
    conditions = {"image": {"embedder": "grid", "channels": 4, "size": 64}}
    with torch.device("meta"):
        bare = VelocityUNet(64, 4, multipliers=multipliers, conditions=conditions)
        conditions["noise_level"] = {"embedder": "scalar", "largest": 999}
        told = VelocityUNet(64, 4, multipliers=multipliers, conditions=conditions)
    counts = [sum(p.numel() for p in network.parameters()) for network in (bare, told)]
    assert counts[0] == exact
    assert all(abs(count / paper - 1) < 0.02 for count in counts)
    x, t = torch.empty(1, 4, 128, 128, device="meta"), torch.empty(1, device="meta")
    image, level = torch.empty_like(x), torch.empty(1, device="meta")
    assert told(x, t, Conditions(image=image, noise_level=level)).shape == x.shape


def test_it_starts_as_zero_velocity_and_every_condition_has_an_effect():
    x, t, told = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.6]), told_of((8, 8))
    assert (small()(x, t, told) == 0).all()
    network = randomized(small())
    base = network(x, t, told)
    for changed in (
        network(x + 1, t, told),
        network(x, t + 0.3, told),
        network(x, t, told.also(image=told["image"] + 1)),
        network(x, t, told.also(noise_level=told["noise_level"] + 100)),
    ):
        assert (changed - base).abs().amax((1, 2, 3)).min() > 1e-4
    with pytest.raises(ValueError, match="needs the condition 'image'"):
        network(x, t, Conditions(noise_level=told["noise_level"]))
    with pytest.raises(ValueError, match="no average velocity"):
        network(x, t, told, t)


def test_it_takes_other_sizes_and_refuses_those_it_cannot_halve():
    network = randomized(small(attention_factors=()), scale=0.05)
    network.middle[0].attention = torch.nn.Identity()  # what is left looks at its surroundings only
    for norm in (m for m in network.modules() if isinstance(m, torch.nn.GroupNorm)):
        norm.forward = lambda h: h
    x, told, t = torch.randn(1, 3, 16, 128), told_of((16, 128), 1), torch.zeros(1)
    whole = network(x, t, told)
    left = network(x[..., :96], t, told.also(image=told["image"][..., :96]))
    torch.testing.assert_close(whole[..., :32], left[..., :32], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[..., 90:96], left[..., 90:])
    with pytest.raises(UserError, match=r"size 8x9 is not divisible by 2.*nearest size that is: 8x8"):
        network(torch.randn(1, 3, 8, 9), t, told_of((8, 9), 1))
    with pytest.raises(UserError, match="base_width must be divisible by 32, not 40"):
        small(base_width=40)


def test_the_average_velocity_is_the_velocity_at_first_and_has_a_derivative():
    torch.manual_seed(0)
    network, plain = randomized(small(average_velocity=True)), randomized(small())
    plain.load_state_dict(network.state_dict(), strict=False)
    torch.nn.init.zeros_(network.interval_in.weight)
    x, v, told = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), told_of((8, 8))
    t, r = torch.tensor([0.2, 0.5]), torch.tensor([0.6, 0.7])
    torch.testing.assert_close(network(x, t, told, r), plain(x, t, told))
    torch.nn.init.normal_(network.interval_in.weight)

    def u(x, t):
        return network(x, t, told, r)

    with forward_mode():
        found = average_velocity_correction(u, x, v, t, r)
    network.double()
    h, x, v, t, r, told = (
        1e-5,
        x.double(),
        v.double(),
        t.double(),
        r.double(),
        told.also(image=told["image"].double()),
    )
    wanted = (r - t).view(2, 1, 1, 1) * (u(x + h * v, t + h) - u(x - h * v, t - h)) / (2 * h)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=2e-2 * wanted.abs().max().item())


def test_positions_made_for_any_size_keep_the_distance_of_neighbours():
    def turned(grid, side):
        cos, sin = rope_table(grid, 1, 8, torch.device("cpu"), torch.float64, side)
        return torch.complex(cos, sin).view(*grid, -1)

    trained, larger = turned((4, 4), None), turned((8, 16), 4)
    step = {z.shape: (z[1:, 1:] * z[:-1, :-1].conj())[0, 0] for z in (trained, larger)}
    torch.testing.assert_close(step[larger.shape], step[trained.shape])
    torch.testing.assert_close(turned((4, 4), 4), trained)
    network = VelocityTransformer(
        16, 3, 2, widths=(16, 16), depths=(1, 1), d_head=8, mapping_width=16, any_size=True
    )
    sides = [
        level[0].attention.trained_side for level in (network.hourglass.down[0], network.hourglass.middle)
    ]
    assert sides == [8, 4]


def test_the_prior_starts_at_the_enlarged_sample_and_takes_any_multiple_of_its_scale():
    prior = UpsamplingPrior(sample_size=8, in_channels=3, scale=4, width=8, depth=1)
    image = torch.randn(2, 3, 12, 20)
    found = prior(image)
    torch.testing.assert_close(found.mean, image)
    assert found.log_var.unique().numel() == 1 and abs(found.log_var.mean()) < math.log(2)
    assert not torch.equal(randomized(prior)(image).mean, image)
    with pytest.raises(UserError, match="UpsamplingPrior: size 12x18 is not divisible by 4"):
        prior(torch.randn(1, 3, 12, 18))
