"""Floating-point operations of a network: counted while it runs, and from its sizes in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lediflow.evaluation.latency import time_once
from lediflow.networks.hourglass import pair
from lediflow.networks.velocity import VelocityTransformer


def _attention_forward(q, k, v, *_args, out_shape=None, **_kwargs) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad, q, k, v, *_args, out_shape=None, **_kwargs) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# torch does not count its own attention kernel for the CPU
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def count_flops(fn: Callable[[], Any]) -> int:
    """Return the operations of the matrix products that `fn` runs, two for each multiply-add.

    What a masked or tiled attention computes and throws away is counted too.
    """
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        fn()
    return counter.get_total_flops()


def velocity_flops(network: VelocityTransformer) -> int:
    """Return the operations of the matrix products in one evaluation for one image, in closed form.

    Neighbourhood attention counts K x K keys for each query, whatever a backend computes besides, so the
    number depends on the network alone and is the useful work. Conditions are counted as for one image.
    """
    c = network.config
    grid = pair(c.sample_size)
    tokens = (grid[0] // c.patch_size) * (grid[1] // c.patch_size)
    grid = (grid[0] // c.patch_size, grid[1] // c.patch_size)
    total = 2 * tokens * network.patch_in.in_features * c.widths[0]
    total += 2 * tokens * c.widths[0] * c.in_channels * c.patch_size**2
    total += _condition_flops(c)
    for i, (width, depth) in enumerate(zip(c.widths, c.depths, strict=True)):
        lowest = i == len(c.widths) - 1
        local = i < len(c.widths) - c.global_levels and min(grid) >= c.kernel_size
        keys = c.kernel_size**2 if local else tokens
        block = 2 * tokens * width * (4 * width + 3 * int(c.ff_factor * width))  # qkv, out, up, down
        block += 4 * tokens * keys * width  # q k^T and its product with v
        block += 2 * 2 * c.mapping_width * width  # the scales of both norms
        total += block * depth * (1 if lowest else 2)
        if not lowest:
            grid, tokens = (grid[0] // 2, grid[1] // 2), tokens // 4
            total += 2 * (2 * tokens * 4 * width * c.widths[i + 1])  # merge and split
    return total


def _condition_flops(c: Any) -> int:
    flat = [of for of in (c.conditions or {}).values() if of["embedder"] == "flat"]
    z = sum(of["channels"] * pair(of["size"])[0] * pair(of["size"])[1] for of in flat)
    mapping = c.mapping_depth * 3 * int(c.ff_factor * c.mapping_width)
    return 2 * c.mapping_width * (c.mapping_width + z + mapping)


@torch.no_grad()
def matmul_rate(
    device: torch.device, dtype: torch.dtype, *, side: int | None = None, repeats: int = 5
) -> float:
    """Return the rate of a large square matrix product on this device, FLOP/s: the best of a few.

    Args:
        device: where.
        dtype: of both factors.
        side: of the matrices; None for 2048 on a CPU, 8192 elsewhere.
        repeats: timed products.
    """
    n = side or (2048 if device.type == "cpu" else 8192)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(time_once(lambda: a @ b, device) for _ in range(repeats))
