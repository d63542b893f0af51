"""Models that come with the package, by their names; each is a folder that `from_pretrained` loads."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def built_in(name: str | Path) -> Path | None:
    """Return the folder of a model that comes with the package, None for any other name.

    A folder of that name with a pipeline in it, in the present directory, is taken before it.
    """
    here = Path(name)
    if (here / "model_index.json").exists() or (here / "pipeline").exists():
        return None
    if str(name) not in built_in_names():
        return None
    return FOLDER / str(name)


def built_in_names() -> list[str]:
    """Names of the models that come with the package, sorted."""
    return sorted(p.parent.name for p in FOLDER.glob("*/model_index.json"))
