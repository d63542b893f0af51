"""What the settings of a config mean, from their types and descriptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from lediflow.errors import UserError, nearest
from lediflow.training.config import all_keys, config_class


@dataclass(frozen=True)
class Setting:
    """One setting of a config.

    Attributes:
        key: as in `--set key=value`.
        type: in words.
        default: None where it must be given, or None is the default.
        meaning: a sentence; empty where the name says it.
    """

    key: str
    type: str
    default: Any
    meaning: str


def explain_settings(key: str | None = None) -> list[Setting]:
    """Return all settings, or one, or those of a section.

    Raises:
        UserError: no setting or section of that name; with the nearest that there is.
    """
    settings = _settings(config_class())
    if key is None:
        return settings
    found = [setting for setting in settings if setting.key == key or setting.key.startswith(f"{key}.")]
    if not found:
        known = all_keys(config_class())
        raise UserError(f"no setting {key!r}{nearest(key, known)}; `lediflow config` lists all")
    return found


def _settings(section: type[BaseModel], prefix: str = "") -> list[Setting]:
    found: list[Setting] = []
    for name, field in section.model_fields.items():
        below = _sections_of(field.annotation)
        if below:
            found += [setting for kind in below for setting in _settings(kind, f"{prefix}{name}.")]
            continue
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        shown = [x.model_dump() for x in default] if name == "ema" and default else default
        plain = list(shown) if isinstance(shown, tuple) else shown
        found.append(Setting(f"{prefix}{name}", _type_name(field.annotation), plain, field.description or ""))
    return found


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field holds itself, not in a list."""
    kinds = (annotation, *(get_args(annotation) if get_origin(annotation) is not tuple else ()))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _type_name(annotation: Any) -> str:
    if annotation is None or annotation is type(None):
        return "null"
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, arguments))
    if get_origin(annotation) is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_type_name(arguments[0])}"
        return f"[{', '.join(map(_type_name, arguments))}]"
    if hasattr(annotation, "__metadata__"):
        return _type_name(arguments[0])
    if arguments:
        return " or ".join(map(_type_name, arguments))
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.get(
        annotation.__name__, annotation.__name__
    )
