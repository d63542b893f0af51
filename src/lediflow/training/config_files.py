"""Where settings come from: presets, YAML files that may start from another, and `--set a.b=c`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from lediflow.errors import UserError, nearest


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package, sorted."""
    return sorted(
        p.name.removesuffix(".yaml") for p in _preset_folder().iterdir() if p.name.endswith(".yaml")
    )


def _preset_folder():
    return resources.files("lediflow") / "presets"


def read_tree(source: str | Path, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the settings of a preset or file, over those of the one that it extends."""
    tree = read_yaml(source)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{source}: extends must name a preset or a YAML file, not {base!r}")
    if base in above or len(above) > 8:
        circle = " -> ".join((*above, str(source), base))
        raise UserError(f"{source}: extends runs in a circle: {circle}")
    beside = Path(source).parent / base
    found = beside if beside.is_file() else base
    return _merged(read_tree(found, (*above, str(source))), tree)


def _merged(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Lay settings over others, section by section."""
    both = dict(base)
    for key, value in tree.items():
        below = both.get(key)
        both[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return both


def read_yaml(source: str | Path) -> dict[str, Any]:
    """Return what a preset or a YAML file says, without the one that it extends.

    Raises:
        UserError: no such preset or file, or not YAML.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"no config file {source}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {source}: {error}") from None
    else:
        names = preset_names()
        if str(source) not in names:
            raise UserError(
                f"unknown preset {str(source)!r}{nearest(str(source), names)}; "
                f"give a YAML file or one of {', '.join(names)}"
            )
        text = (_preset_folder() / f"{source}.yaml").read_text(encoding="utf-8")
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{source} must hold settings as `key: value`")
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put "a.b=value", the value as in YAML, into a tree of settings.

    Raises:
        UserError: it is not written so.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override!r}: write it as key.subkey=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override!r}: {text!r} is not a valid value") from None
    set_value(tree, key, _number(value) if isinstance(value, str) else value)


def set_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put a value at "a.b" of a tree of settings.

    Raises:
        UserError: a part of the key is a value, not a section.
    """
    *parents, last = key.strip().split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {key}: {parent!r} is a value, it has no keys below it")
    node[last] = value


def _number(text: str) -> str | float:
    # YAML 1.1 reads 1e-3 as a string, which nobody means
    try:
        return float(text)
    except ValueError:
        return text
