"""Where the flow starts when z is that of a picture, changed or in part made anew."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lediflow import ode
from lediflow.conditions import Conditions
from lediflow.fields import inpainted
from lediflow.flow import phi
from lediflow.pipelines.inpainting import Inpainting
from lediflow.pipelines.photos import covered

LATENT_STEPS = 8  # midpoint steps of the latent sampler, back and forth


class LatentStart(Inpainting):
    """Mixin of LeDiFlowPipeline: x ~ P_L for a picture."""

    def _source(
        self,
        y: Tensor,
        indices: Sequence[int],
        seed: int,
        labels: Conditions,
        *,
        strength: float = 0.0,
        constant_noise: bool = False,
        latent_begin: float = 1.0,
        latent_solver: str | None = None,
        latent_steps: int | None = None,
        region: Tensor | None = None,
        hide: bool = False,
    ) -> tuple[Tensor, Conditions, dict[str, float]]:
        """x ~ P_L at the picture's z, or at z' of the noise that z came from, moved by `strength`.

        With `latent_begin` z' is where the latent sampler leads from phi_t of z at that time. With a `region`
        of the picture, bool (1, 1, H, W), only z of that changes; with `hide` it is made without the encoder.
        """
        z, evaluations = self.encode(y).mean.expand(len(indices), *[-1] * 3), 0.0
        nfe: Counter[str] = Counter(encoder=1, decoder=1)
        back, forth = latent_solvers(latent_solver, latent_steps)
        if region is not None and hide:
            w = self.noise(self.auxiliary.z_shape, indices, seed, "w")
            z, more = self._imagined(y, z, w, region, labels, forth)
            nfe.update(more)
        labels = self.of_cluster(labels, z)
        r = self.noise(self.auxiliary.z_shape, indices, seed, "r")
        if latent_begin < 1:
            times = torch.full((len(z),), latent_begin, device=z.device)
            start = phi(r, self.auxiliary.standardize(z), times)
            sampler = self.field(self.sampler, labels)
            moved = ode.integrate(
                sampler, start, steps=latent_steps, solver=latent_solver, begin=latent_begin
            )
            z, evaluations = self.auxiliary.unstandardize(moved.end), moved.nfe
        elif strength:
            w = self.invert_z(z, labels, **back)
            cells = torch.ones_like(z[:, :1], dtype=torch.bool)
            if region is not None:
                cells = covered(region, z.shape[-2:]).to(z.device).expand_as(cells)
            z, evaluations = self._changed(z, moved_noise(w.end, r, strength), cells, labels, forth)
            evaluations += w.nfe
        noise = self.noise(self.sample_shape, [0] * len(indices) if constant_noise else indices, seed, "x")
        nfe.update(used("sampler", evaluations))
        return self.source(z, noise), labels.also(z=z), dict(nfe)

    def _changed(
        self, z: Tensor, w: Tensor, cells: Tensor, labels: Conditions, how: dict[str, Any]
    ) -> tuple[Tensor, float]:
        """Carry w to z where `cells` is, (N, 1, h, w), and leave z as it is elsewhere; and evaluations.

        That is eq. 7 in the space of z, so what comes is made for the z around. It is not guided, for the way
        to w was not.
        """
        known = self.auxiliary.standardize(z)
        sampler = self.field(self.sampler, labels, count=len(z))
        made = ode.integrate(inpainted(sampler, cells, known - w), w, **how)
        return self.auxiliary.unstandardize(torch.where(cells, made.end, known)), made.nfe

    def _imagined(
        self, y: Tensor, z: Tensor, w: Tensor, hidden: Tensor, labels: Conditions, how: dict[str, Any]
    ) -> tuple[Tensor, Counter[str]]:
        """Make the part of z that stands for what is hidden, by eq. 7 in the space of z; and evaluations.

        The encoder needs something in the hole, which also reaches the cells around. So the mean of the
        prior goes there, and all is done once more. A cell is made anew if half of its pixels are hidden.

        Args:
            y: the picture, (1, C, H, W), its hole filled smoothly.
            z: of the picture, (N, c, h, w).
            w: preimages of the new z, (N, c, h, w).
            hidden: bool, (1, 1, H, W).
            labels: a row for each variant.
            how: solver and steps of the latent sampler.
        """
        share = F.adaptive_avg_pool2d(hidden.to(y), z.shape[-2:])
        cells, nfe = (share >= 0.5).expand(len(z), -1, -1, -1), Counter[str]()
        if not bool(cells.any()):
            return z, nfe
        hole = covered(hidden, self.sample_shape[1:]).to(y.device)
        for repeated in (False, True):
            if repeated:
                z = self.encode(torch.where(hole, self.prior(z).mean, y)).mean
                nfe.update(encoder=1, decoder=1)
            z, evaluations = self._changed(z, w, cells, self.of_cluster(labels, z), how)
            nfe.update({"sampler": evaluations})
        return z, nfe


def moved_noise(w: Tensor, r: Tensor, strength: float) -> Tensor:
    """Return sqrt(1 - strength^2) * w + strength * r, from w (at 0) to new noise (at 1).

    The paper's w + alpha * r (section 4.2) has more variance than 1, which the sampler has never seen.
    """
    return math.sqrt(1 - strength**2) * w + strength * r


def latent_solvers(solver: str | None, steps: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return solver and steps of the latent sampler from z to w and from w to z.

    Both ways alike, for what was not moved should come back. "mean" has no way back, so that is the usual
    one's, along the velocity itself (r = t).

    Raises:
        UserError: unknown solver, or steps below 1.
    """
    usual: dict[str, Any] = {"solver": "midpoint", "steps": LATENT_STEPS}
    if solver == "mean":
        back, forth = usual, usual | {"solver": "mean", "steps": 1 if steps is None else steps}
    else:
        back = forth = usual | {"solver": solver or "midpoint", "steps": steps or LATENT_STEPS}
    ode.check_solver(forth["solver"], LATENT_STEPS if steps is None else steps)
    return back, forth


def used(name: str, evaluations: float) -> dict[str, float]:
    """Return the count of a network, or nothing where it was not evaluated."""
    return {name: evaluations} if evaluations else {}
