"""The one exception that stands for a user's mistake.

The command line prints its message without a traceback and leaves with exit code 2, so the
message must say what is wrong and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave or asked for cannot work; the message says what, and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the nearest known name, or an empty string.

    Args:
        name: what was written.
        known: the names that would have been valid.
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
