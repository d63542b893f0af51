"""Counted operations against the closed form."""

import pytest
import torch
from flops import count_flops, matmul_rate, velocity_flops

from lediflow.networks.conditions import example_conditions
from lediflow.networks.velocity import VelocityTransformer

COMMON = {"d_head": 16, "mapping_width": 32, "mapping_depth": 1}


def inputs(network, size):
    c = network.config
    return torch.ones(1, c.in_channels, *size), torch.zeros(1), example_conditions(c.conditions or {}, 1)


@pytest.mark.parametrize("side", [8, 32])
def test_global_attention_is_counted_as_the_closed_form_says(side):
    """At 8x8 attention is computed explicitly, at 32x32 by torch's kernel."""
    network = VelocityTransformer(side, 4, 1, (64,), (2,), **COMMON)
    arguments = inputs(network, (side, side))
    with torch.no_grad():
        assert count_flops(lambda: network(*arguments)) == velocity_flops(network)


def test_neighbourhoods_levels_and_conditions():
    """A dense mask computes every pair of tokens; the closed form counts the K x K that are used."""
    network = VelocityTransformer(
        (16, 32), 3, 2, (32, 64), (1, 2), kernel_size=3,
        conditions={"z": {"embedder": "flat", "channels": 2, "size": 4}}, **COMMON,
    )  # fmt: skip
    tokens = 8 * 16
    wasted = 2 * 4 * tokens * (tokens - 9) * 32  # one block down, one up; products q k^T and with v
    arguments = inputs(network, (16, 32))
    with torch.no_grad():
        assert count_flops(lambda: network(*arguments)) == velocity_flops(network) + wasted


def test_a_known_product():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_matmul_rate_is_a_rate():
    assert matmul_rate(torch.device("cpu"), torch.float32, side=64, repeats=1) > 0
