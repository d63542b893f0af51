"""Exponential moving averages (EMA) of the weights, several at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lediflow.training.config import AverageConfig
from lediflow.training.processes import local

RAMP = 0.05  # a half-life is at most this share of the images seen, so that the start is forgotten


def decay_at(step: int, settings: AverageConfig, batch_size: int) -> float:
    """Return the weight of the old average at `step` (from 1); it is small at first and then grows.

    With a power p: 1 - step^(-p), at most `max_decay`. With a half-life H: 1/2 to the power of
    batch_size / H, where H is counted in images and starts at 5% of the images seen (arXiv 2206.00364).
    """
    if settings.half_life is None:
        return min(settings.max_decay, 1 - step**-settings.power)
    return 0.5 ** (batch_size / min(settings.half_life, RAMP * step * batch_size))


class Averages:
    """The averages of some parameters, by name.

    Args:
        parameters: what is averaged, whole or in shards; fp32.
        settings: of each average; the first is the one that is used.
        batch_size: images of a step, over all processes.

    Attributes:
        tensors: of each average, in the order of the parameters and sharded as they are.
        steps: how many updates there were.
    """

    def __init__(self, parameters: Sequence[Tensor], settings: Sequence[AverageConfig], batch_size: int):
        self.settings, self.batch_size, self.steps = settings, batch_size, 0
        self.tensors = {s.name: [p.detach().clone() for p in parameters] for s in settings}

    @property
    def first(self) -> list[Tensor]:
        """The average that is used."""
        return self.tensors[self.settings[0].name]

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor]) -> None:
        """Move every average towards the parameters."""
        self.steps += 1
        current = [local(p) for p in parameters]
        for settings in self.settings:
            blend = get_ema_multi_avg_fn(decay_at(self.steps, settings, self.batch_size))
            blend([local(t) for t in self.tensors[settings.name]], current, None)

    @contextmanager
    def used_by(self, parameters: Sequence[Tensor]):
        """Give the parameters the values of the first average for a while, in place."""
        self._swap(parameters)
        try:
            yield
        finally:
            self._swap(parameters)

    @torch.no_grad()
    def _swap(self, parameters: Sequence[Tensor]) -> None:
        for parameter, average in zip(parameters, self.first, strict=True):
            kept = local(parameter).clone()
            local(parameter).copy_(local(average))
            local(average).copy_(kept)
