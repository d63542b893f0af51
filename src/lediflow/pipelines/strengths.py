"""How strongly a network may be guided: by an evaluation more, or as it has learned; and the temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lediflow.conditions import LABELS
from lediflow.errors import UserError


@dataclass(frozen=True)
class Strength:
    """One guidance of one network.

    Attributes:
        network: that is guided.
        kind: "guidance" by class, cluster and text, or "autoguidance" away from a worse network.
        weak: that worse network; None where there is none.
        weak_stage: the stage that trains it, for messages.
    """

    network: Any
    kind: str
    weak: Any = None
    weak_stage: str = ""
    usual: ClassVar[tuple[float, float]] = (1.0, 4.0)  # what a user may want of one that is not learned

    @property
    def learned(self) -> tuple[float, float] | None:
        """The range of strengths that the network has learned, for which it takes one evaluation; or None."""
        settings = (self.network.config.get("conditions") or {}).get(self.kind)
        return (settings["low"], settings["high"]) if settings else None

    @property
    def possible(self) -> bool:
        """Whether there is anything to guide by."""
        if self.learned:
            return True
        if self.kind == "autoguidance":
            return self.weak is not None
        return any(name in LABELS for name in self.network.config.get("conditions") or ())

    def guides_by(self, labels: Sequence[str]) -> bool:
        """Whether it can do something for images that have these conditions."""
        told = self.network.config.get("conditions") or {}
        return self.kind != "guidance" or any(name in told for name in labels)

    def check(self, name: str, value: float) -> None:
        """Refuse a strength that this network cannot have.

        Args:
            name: of the argument, for the message.
            value: 1 for none.

        Raises:
            UserError: no finite number, nothing to guide by, or a strength outside of what was learned.
        """
        if not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, not {value:g}")
        if self.learned and not self.learned[0] <= value <= self.learned[1]:
            low, high = self.learned
            raise UserError(f"{name} {value:g} is not among what this model learned, {low:g} to {high:g}")
        if value == 1 or self.possible:
            return
        if self.kind == "autoguidance":
            raise UserError(
                f"{name} {value:g} needs a weak network, and this model has none; leave it at 1, or train "
                f"one with `lediflow train ... --stage {self.weak_stage}`"
            )
        raise UserError(f"{name} {value:g} needs a model with classes, clusters or text; leave it at 1")


@dataclass(frozen=True)
class Temperature:
    """How much of the source's noise an image starts with: x = mu + temperature * sigma * noise.

    Below 1 the images are cleaner and vary less; Glow (arXiv 1807.03039) samples so. With eq. 3 it costs
    little variety, for most of that is in z.
    """

    learned: ClassVar[tuple[float, float] | None] = None
    possible: ClassVar[bool] = True
    usual: ClassVar[tuple[float, float]] = (0.0, 1.5)

    def guides_by(self, labels: Sequence[str]) -> bool:
        """Whether it can do something for images that have these conditions."""
        return True

    def check(self, name: str, value: float) -> None:
        """Refuse what is no temperature.

        Args:
            name: of the argument, for the message.
            value: 1 for the source as it was trained.

        Raises:
            UserError: below 0, or above 1.5: no flow has learned from there.
        """
        low, high = self.usual
        if not low <= value <= high:
            raise UserError(f"{name} must be between {low:g} and {high:g}, not {value:g}")
