"""How much one visitor may ask of the page."""

from __future__ import annotations

from dataclasses import dataclass

from lediflow.errors import UserError

MOST_SEED = 2**53 - 1  # the largest whole number that a browser holds


@dataclass(frozen=True)
class Limits:
    """What is refused with a sentence before any work begins.

    Attributes:
        pictures: of one request.
        variants: of one edited picture.
        steps: of a solver.
        pixels: of an uploaded picture.
        made_pixels: of an enlarged picture.
        file_mb: of an uploaded file, megabytes.
        queue: requests that wait.
        kept: pictures of one session; the oldest make room.
        sessions: that are held at once.
        idle_seconds: after which an uploaded file is forgotten.
    """

    pictures: int = 64
    variants: int = 16
    steps: int = 64
    pixels: int = 16_000_000
    made_pixels: int = 16_777_216
    file_mb: int = 20
    queue: int = 32
    kept: int = 200
    sessions: int = 100
    idle_seconds: int = 3600

    def whole(self, name: str, value: object, most: int, least: int = 1) -> int:
        """Return a whole number that a visitor gave.

        Raises:
            UserError: it is none, or outside of `least` to `most`.
        """
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
        if number is None or number != number or abs(number) == float("inf") or number != int(number):
            raise UserError(f"{name} must be a whole number")
        if not least <= number <= most:
            raise UserError(f"{name} must be from {least:,} to {most:,}, not {int(number):,}")
        return int(number)

    def seed(self, value: object) -> int:
        """Return a seed that a visitor gave.

        Raises:
            UserError: it is no whole number, or out of range.
        """
        return self.whole("the seed", value, MOST_SEED, 0)
