"""`lediflow presets`: what can be trained by name."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def presets(
    name: Annotated[str | None, typer.Argument(help="Show this preset's settings as YAML.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, with parameter counts.")] = False,
) -> None:
    """List the presets, or print one as YAML to start a config of your own from.

    Examples:

        lediflow presets

        lediflow presets flowers-64 > mine.yaml
    """
    from lediflow.training.config import load_config
    from lediflow.training.config_files import preset_names

    if as_json:
        from lediflow.training.builders import count_parameters

        names = [name] if name else preset_names()
        print(json.dumps({n: _report(load_config(n), count_parameters) for n in names}, indent=1))
        return
    if name is not None:
        print(load_config(name).to_yaml(), end="")
        return

    from rich.console import Console
    from rich.table import Table

    table = Table("preset", "size", "what", "needs", box=None, pad_edge=False)
    for n in preset_names():
        config = load_config(n)
        table.add_row(n, f"{config.data.image_size} px", config.description, config.needs)
    Console().print(table)


def _report(config, count_parameters) -> dict:
    counts = count_parameters(config)
    return {
        "description": config.description,
        "needs": config.needs,
        "measured": config.measured,
        "image_size": config.data.image_size,
        "parameters": {name: counts[name] for name in config.training.stages if name in counts},
    }
