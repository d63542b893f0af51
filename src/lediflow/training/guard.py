"""What a run does about losses that are not finite or leap up: skip the step, go back, then give up.

A bad step changes nothing. After PATIENCE of them in a row the run goes back to its last good checkpoint,
sees other images and noise from there, and learns at half the rate until it has saved a checkpoint beyond the
place where it failed. When it failed ROLLBACKS times without getting there, it stops.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field, replace
from typing import Any

WINDOW = 100  # losses that tell what is usual
PATIENCE = 5
ROLLBACKS = 3


class Diverged(Exception):
    """PATIENCE bad steps in a row; the arguments are the last of them and what was seen there."""


@dataclass
class Guard:
    """Judges every step; its state is kept in the checkpoints, so that a resumed run judges alike.

    Attributes:
        losses: the last WINDOW losses of good steps.
        bad: bad steps in a row, until now.
        skipped: bad steps of this stage.
        attempt: how often the run went back; images and noise depend on it.
        rollbacks: how often since a checkpoint beyond `failed_at` was saved.
        failed_at: the step that the last rollback left.
    """

    losses: list[float] = field(default_factory=list)
    bad: int = 0
    skipped: int = 0
    attempt: int = 0
    rollbacks: int = 0
    failed_at: int = 0

    @property
    def rate(self) -> float:
        """The share of the learning rate that is used."""
        return 0.5**self.rollbacks

    def judge(self, loss: float, norm: float, spike: float) -> str:
        """Return what is wrong with a step, or an empty string, and remember it.

        Args:
            loss: over the whole batch.
            norm: of the gradient.
            spike: how many mean absolute deviations above the median of the last losses are too many; 0
                allows any number.
        """
        if not math.isfinite(loss) or not math.isfinite(norm):
            fault = f"the loss ({loss:g}) or its gradient ({norm:g}) is not finite"
        elif spike and len(self.losses) == WINDOW and loss > self._limit(spike):
            fault = f"the loss leaps to {loss:g}, where {statistics.median(self.losses):g} is usual"
        else:
            self.losses = [*self.losses[1 - WINDOW :], loss]
            self.bad = 0
            return ""
        self.bad += 1
        self.skipped += 1
        return fault

    def _limit(self, spike: float) -> float:
        middle = statistics.median(self.losses)
        deviation = statistics.fmean(abs(loss - middle) for loss in self.losses)
        # a loss that hardly varies must not make float noise a leap
        return middle + spike * max(deviation, 1e-3 * (1 + abs(middle)))

    def after_rollback(self, good: Guard, step: int) -> Guard:
        """Return the guard to continue with when this one failed at `step`; `good` is the checkpoint's."""
        return replace(
            good,
            skipped=self.skipped,
            attempt=self.attempt + 1,
            rollbacks=self.rollbacks + 1,
            failed_at=max(self.failed_at, step),
        )

    def saving(self, step: int) -> None:
        """Note that a checkpoint is about to be saved: beyond the failure, the full rate returns."""
        if step > self.failed_at and not self.bad:
            self.rollbacks = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return asdict(self)
