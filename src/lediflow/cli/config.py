"""`lediflow config`: what every setting means."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lediflow.cli.options import Json


def config(
    key: Annotated[
        str | None,
        typer.Argument(metavar="[KEY]", help="A setting or a section of them, such as training.flow."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Explain the settings of a config: what each means, its type and its default.

    Examples:

        lediflow config training.flow

        lediflow config data.classes
    """
    from lediflow.training.explain import explain_settings

    settings = explain_settings(key)
    if as_json:
        print(json.dumps([setting.__dict__ for setting in settings]))
        return

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("setting", no_wrap=True)
    for heading in ("type", "default", "meaning"):
        table.add_column(heading)
    for setting in settings:
        cells = (setting.type, "" if setting.default is None else str(setting.default), setting.meaning)
        table.add_row(setting.key, *map(escape, cells))
    Console().print(table)
