"""Whether an image shows what it was asked for: R-precision, judged by real images of the same names.

As in text-to-image papers an image must find its own text among others (arXiv 1711.10485), but nobody needs a
model that knows words: each name stands for the real images that have it, which no model was trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lediflow.errors import UserError


def name_ranks(generated: Tensor, asked: Tensor, real: Tensor, names: Tensor) -> Tensor:
    """Return how many names have a real image nearer to a generated image than its own name has.

    Args:
        generated: features (N, D).
        asked: number of the name that each was made of, (N,), in [0, K).
        real: features (M, D) of real images, by the same feature network.
        names: the number of the name of each, (M,); every name of [0, K) has at least one.

    Returns:
        integers (N,) in [0, K): 0 where the nearest real image has the name that was asked for.

    Raises:
        UserError: a name without real images.
    """
    count = int(max(asked.max(), names.max())) + 1
    if len(names.unique()) < count:
        raise UserError(f"only {len(names.unique())} of {count} names have real images to judge by")
    # where all features are much alike, angles tell more than distances
    centre = real.double().mean(0)
    ours, theirs = (torch.nn.functional.normalize(x.double() - centre, dim=1) for x in (generated, real))
    distance = 1 - ours @ theirs.T
    index = names.to(distance.device).expand_as(distance)
    nearest = distance.new_full((len(distance), count), torch.inf)
    nearest = nearest.scatter_reduce(1, index, distance, "amin")
    own = nearest.gather(1, asked.to(distance.device)[:, None])
    return (nearest < own).sum(1)


def r_precision(ranks: Tensor, first: int) -> Tensor:
    """Return for each image whether its name is among the `first` names, 0 or 1 as float64; the mean counts.

    By chance it is `first` over the number of names.
    """
    return (ranks < first).double()
