"""The trained network that a refining stage starts from, as a teacher of guidance.

Guided, it takes two evaluations or more; a network that is told the strengths and learns the guided velocity
takes one (as in arXiv 2505.13447 and 2512.02012).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lediflow.conditions import Conditions
from lediflow.errors import UserError
from lediflow.fields import Field, conditional, guided, plain_and_guided
from lediflow.sources import BatchNoise
from lediflow.training.config import Config
from lediflow.training.couplings import Context
from lediflow.training.stages import StageSpec


def check_strengths(config: Config, stages: Iterable[StageSpec]) -> None:
    """Refuse to learn guidance where there is nothing to guide by.

    Raises:
        UserError: naming the stage and what it lacks.
    """
    for spec in stages:
        strengths = getattr(config.stage(spec.name), "strengths", {})
        told = config.data.classes or config.clusters.told(spec.network) or config.text.told(spec.network)
        if "guidance" in strengths and not told:
            raise UserError(
                f"training.{spec.section}.guidance needs classes (data.classes), clusters (clusters.count, "
                f"and {spec.network} in clusters.networks) or text (text.encoder, and {spec.network} in "
                "text.networks)"
            )
        if "autoguidance" in strengths and spec.weak is None:
            raise UserError(f"training.{spec.section}.autoguidance: this stage has no weak network")


class Teacher:
    """Guides what a stage learns, where its settings say so; otherwise it changes nothing.

    Args:
        spec: the row of the stage.
        context: what the stages of the run share.
        always: load the network also where there is no guidance.
    """

    def __init__(self, spec: StageSpec, context: Context, *, always: bool = False):
        self.ranges = context.config.strengths(spec)
        wanted = spec.starts_from is not None and (always or self.ranges)
        self.network: Any = context.network(spec.starts_from) if wanted and spec.starts_from else None
        self.weak = context.network(spec.weak) if "autoguidance" in self.ranges and spec.weak else None

    def strengths(self, conditions: Conditions, noise: BatchNoise) -> Conditions:
        """Draw a strength of each guidance for every image, uniform on its range, as conditions."""
        drawn = {name: low + (high - low) * noise.uniform(name) for name, (low, high) in self.ranges.items()}
        return conditions.also(**drawn)

    def field(self, conditions: Conditions) -> Field:
        """Return the teacher's field, guided as strongly as the conditions say."""
        if self.network.average_velocity:  # it has learned its guidance
            return conditional(self.network, conditions)
        told, options = self._guidance(conditions)
        return guided(self.network, told, **options)

    def _guidance(self, conditions: Conditions) -> tuple[Conditions, dict[str, Any]]:
        """What the teacher is told, and the options of its guidance."""
        strengths = {name: conditions[name] for name in self.ranges}
        told = conditions.only([name for name in conditions if name not in self.ranges])
        return told, {"drop": told.labels, "weak": self.weak, **strengths}

    @torch.no_grad()
    def velocity(self, point: Tensor, t: Tensor, conditions: Conditions, v: Tensor) -> Tensor:
        """Return the velocity to learn at `point` (B, ...).

        Args:
            point: of the path.
            t: its time, (B,).
            conditions: a row for each image, with strengths.
            v: y - x of the pairs, shape of `point`.

        Returns:
            v without guidance, else v plus what guidance adds to the teacher's velocity: so at a strength of
            1 nothing of the teacher's errors is learned.
        """
        if not self.ranges:
            return v
        told, options = self._guidance(conditions)
        plain, led = plain_and_guided(self.network, told, **options)(t, point, None)
        return v + led.float() - plain.float()
