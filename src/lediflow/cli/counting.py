"""How far a command has come with a number of images: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def counting(name: str, *, silent: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Give a function to be called with the numbers of images done and to do; it shows them on stderr.

    Args:
        name: of what is under way.
        silent: show nothing; for all processes but the main one.
    """
    from lediflow.progress import Progress

    with ExitStack() as stack:
        bar: Progress | None = None
        began = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:  # the total is known with the first call
                bar = stack.enter_context(Progress(name, 0, total, silent=silent))
            bar.update(done, f"{done / max(time.monotonic() - began, 1e-6):,.0f} images/s")

        yield update
