"""What the documentation takes from elsewhere: a hook of MkDocs that makes pages of the code.

reference/command-line.md  every command with its options, from typer
reference/settings.md      every setting with default and meaning, from pydantic, as in `lediflow config`
reference/python.md        what `import lediflow` offers, from the docstrings by mkdocstrings
project/*.md               CONTRIBUTING.md and CHANGELOG.md, which stand at the root

`python docs/reference.py` lists the links that lead out of the site, which nothing checks.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "https://github.com/lediflow/lediflow/blob/main"
PYTHON_PAGES = {
    "Pipelines": [
        "LeDiFlowPipeline",
        "FlowMatchingPipeline",
        "FlowUpsamplePipeline",
        "load_pipeline",
        "boost",
    ],
    "Training": ["load_config", "train"],
    "Networks": ["AuxiliaryModel", "VelocityTransformer"],
    "Parts": ["DiagonalGaussian", "integrate", "UserError"],
}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made; called by MkDocs."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> dict[str, str]:
    """Return the pages that are made, by their path."""
    sys.path.insert(0, str(ROOT / "src"))
    return {
        "reference/command-line.md": command_line(),
        "reference/settings.md": settings(),
        "reference/python.md": python(),
        "project/contributing.md": from_root("CONTRIBUTING.md"),
        "project/changelog.md": from_root("CHANGELOG.md"),
    }


def command_line() -> str:
    """Every command: what it does, how it is called, its arguments and options."""
    import typer

    from lediflow.cli.app import app

    lines = [
        "# Command line",
        "",
        "`lediflow COMMAND --help` says the same. `lediflow --version` names the version.",
    ]
    root: Any = typer.main.get_command(app)
    for words, command in _commands(root, ("lediflow",)):
        context = command.make_context(" ".join(words), [], resilient_parsing=True)
        usage = " ".join([*words, *command.collect_usage_pieces(context)])
        lines += [
            "",
            f"## {' '.join(words)}",
            "",
            "```text",
            usage,
            "```",
            "",
            _described(command.help or ""),
            "",
        ]
        rows = [
            _row(parameter, context)
            for parameter in command.params
            if not getattr(parameter, "hidden", False)
        ]
        rows = [row for row in rows if row]
        if rows:
            lines += ["| | default | |", "| --- | --- | --- |", *rows]
    return "\n".join(lines) + "\n"


def _commands(group: Any, words: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found += _commands(command, (*words, name))
        else:
            found.append(((*words, name), command))
    return found


def _described(text: str) -> str:
    """A command's docstring; its examples become code, so that nothing in them is markup."""
    text = re.sub(r"\n\s*\n\s*(?=lediflow |torchrun )", "\n\n    ", text.replace("\f", ""))
    return re.sub(r"^(Examples?):$", r"**\1**", text, flags=re.MULTILINE)


def _row(parameter: Any, context: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    if parameter.param_type_name == "argument":
        names = f"`{parameter.metavar or parameter.name.upper()}`"
    if "--help" in names or "completion" in names:
        return ""
    default = parameter.default
    shown = (
        "" if default in (None, False, "", ()) or callable(default) or parameter.required else f"`{default}`"
    )
    return f"| {names} | {shown} | {_cell(getattr(parameter, 'help', '') or '')} |"


def settings() -> str:
    """Every setting of a config, one table for each section."""
    from lediflow.training.explain import explain_settings

    lines = [
        "# Settings",
        "",
        "A config is a preset or a YAML file, changed by `--set key=value`. `lediflow config KEY` says "
        "the same as this page, and `lediflow presets NAME` prints what a preset sets.",
    ]
    section = None
    for setting in explain_settings():
        of = setting.key.rpartition(".")[0]
        if of != section:
            section = of
            heading = f"`{of}`" if of else "The config itself"
            lines += [
                "",
                f"## {heading}",
                "",
                "| setting | type | default | meaning |",
                "| --- | --- | --- | --- |",
            ]
        default = "" if setting.default is None else f"`{_cell(str(setting.default))}`"
        lines.append(f"| `{setting.key}` | {_cell(setting.type)} | {default} | {_cell(setting.meaning)} |")
    return "\n".join(lines) + "\n"


def python() -> str:
    """What `import lediflow` offers, for mkdocstrings to fill in."""
    lines = [
        "# Python",
        "",
        "All of this is `from lediflow import NAME`. Images are tensors (N, C, H, W) in [-1, 1], or PIL "
        "images.",
    ]
    from lediflow import _HOMES

    for heading, names in PYTHON_PAGES.items():
        lines += ["", f"# {heading}", ""]
        for name in names:
            lines += [f"::: lediflow.{_HOMES[name]}.{name}", ""]
    return "\n".join(lines) + "\n"


def from_root(name: str) -> str:
    """A page of a file at the root; its links lead from there."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](../", text)
    return re.sub(r"\]\((?!\.\./|https?:|#)([^)]+)\)", rf"]({REPOSITORY}/\1)", text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;").replace("[", "\\[")


def external_links() -> dict[str, list[str]]:
    """Links that lead out, with the files of the repository that have them."""
    found: dict[str, list[str]] = {}
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]):
        for link in re.findall(r"https?://[^\s)>\"'`]+", path.read_text(encoding="utf-8")):
            found.setdefault(link.rstrip(".,;"), []).append(str(path.relative_to(ROOT)))
    return found


if __name__ == "__main__":
    for link, where in external_links().items():
        print(f"{link}  {', '.join(dict.fromkeys(where))}")
