"""One visitor's pictures: each a PNG that says how it was made, in a folder of the page's own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lediflow.files import explained, written_whole
from lediflow.pipelines.recipes import Recipe


@dataclass(frozen=True)
class Kept:
    """A picture of the session.

    Attributes:
        path: of its PNG.
        recipe: that is written in it; None for an anonymized or enlarged picture.
        caption: what the page calls it.
    """

    path: Path
    recipe: Recipe | None
    caption: str


@dataclass
class Session:
    """A visitor's pictures, the newest last; a copy of an empty one is another visitor's.

    Attributes:
        home: folder in which that of the session is made.
        most: pictures that are kept.
        kept: the pictures.
    """

    home: Path
    most: int
    kept: list[Kept] = field(default_factory=list)
    _folder: Path | None = None
    _count: int = 0

    def keep(
        self, image: Image.Image, recipe: Recipe | None, caption: str, text: PngInfo | None = None
    ) -> Kept:
        """Write a picture with its recipe, and forget the oldest where there are too many.

        Args:
            image: the picture.
            recipe: how it was made; None for none.
            caption: what the page calls it.
            text: of the PNG, in place of the recipe's.

        Raises:
            UserError: the disk is full.
        """
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="session-", dir=self.home))
        tool = "picture" if recipe is None else recipe.tool
        path = self._folder / f"lediflow-{tool}-{self._count:05d}.png"
        self._count += 1
        with explained(path), written_whole(path) as unfinished:
            image.save(unfinished, pnginfo=text or (recipe.png_text() if recipe else None))
        kept = Kept(path, recipe, caption)
        self.kept.append(kept)
        self._forget(self.kept[: -self.most])
        return kept

    def mine(self, path: str | Path) -> Kept | None:
        """Return the picture of a path, if it is of this session."""
        return next((one for one in self.kept if one.path == Path(path)), None)

    def close(self) -> None:
        """Remove all pictures."""
        self.kept.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __del__(self):
        self.close()  # also of a session that Gradio dropped because there were too many

    def _forget(self, old: Iterable[Kept]) -> None:
        for one in list(old):
            one.path.unlink(missing_ok=True)
            self.kept.remove(one)
