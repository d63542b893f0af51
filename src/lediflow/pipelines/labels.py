"""The classes, clusters and texts that a request asks for."""

from __future__ import annotations

import operator
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lediflow.errors import UserError, nearest
from lediflow.files import quoted
from lediflow.networks.text import plain_words

ClassLabels = int | str | Sequence[int | str] | None
Clustering = int | Sequence[int] | None
Prompt = str | Sequence[str] | None


def check_labels(
    class_labels: Any, num_classes: int, id2label: Mapping[str, str] | None, kind: str = "class"
) -> list[int]:
    """Return the classes that the images of a request take in turn, empty for a model without classes.

    Args:
        class_labels: one class or several, by index (any integer type) or name; None for all that had images.
        num_classes: of the model.
        id2label: name of each index that had training images, where known.
        kind: what they are, for messages.

    Raises:
        UserError: an unknown class, no class, or a model without classes.
    """
    if not num_classes:
        if class_labels is not None:
            raise UserError("this model was trained without classes; leave class_labels out")
        return []
    if class_labels is None:
        return sorted(map(int, id2label)) if id2label else list(range(num_classes))
    if hasattr(class_labels, "tolist"):  # arrays and tensors
        class_labels = class_labels.tolist()
    several = isinstance(class_labels, Iterable) and not isinstance(class_labels, str)
    wanted = list(class_labels) if several else [class_labels]
    if not wanted:
        raise UserError(f"name at least one {kind}")
    return [_index(label, num_classes, id2label or {}, kind) for label in wanted]


def check_clusters(cluster: Any, clusters: Any) -> list[int]:
    """Return the clusters that the images of a request take in turn, empty where none are asked for.

    Args:
        cluster: one or several, by index.
        clusters: of the model; None for a model without.

    Raises:
        UserError: an unknown cluster, one without images, or a model without clusters.
    """
    if cluster is None:
        return []
    if clusters is None:
        raise UserError("this model was trained without clusters; leave cluster out")
    wanted = check_labels(cluster, clusters.config.count, None, "cluster")
    images = clusters.images.sum(0).tolist()
    for number in wanted:
        if not images[number]:
            raise UserError(f"cluster {number} has no training images; choose another")
    return wanted


def check_prompt(prompt: Any, network: Any) -> list[str]:
    """Return the texts that the images of a request take in turn, empty where none are asked for.

    Args:
        prompt: one or several.
        network: that is told texts; None for a model without.

    Raises:
        UserError: no text, something else than text, or a model without texts.
    """
    if prompt is None:
        return []
    if network is None:
        raise UserError("this model was trained without text (text.encoder); leave prompt out")
    wanted = [prompt] if isinstance(prompt, str) else list(prompt)
    if not wanted:
        raise UserError("give at least one prompt")
    for text in wanted:
        if not isinstance(text, str):
            raise UserError(f"a prompt is a text, not {text!r}")
    settings = network.config.conditions["text"]
    if settings["embedder"] == "characters":
        length = settings["length"]
        warn_of_cut([text for text in wanted if len(plain_words(text).encode()) > length], length, "bytes")
    return wanted


def warn_of_cut(long: Sequence[str], length: int, unit: str) -> None:
    """Warn where some prompts are longer than a model reads."""
    if long:
        warnings.warn(
            f"a prompt is cut after {length} {unit}, which is what this model reads: "
            f"{quoted(textwrap.shorten(long[0], 80))}",
            stacklevel=3,
        )


def _index(label: int | str, num_classes: int, id2label: Mapping[str, str], kind: str) -> int:
    by_name = {name: int(index) for index, name in id2label.items()}
    if isinstance(label, str) and label in by_name:
        return by_name[label]
    if isinstance(label, str) and not label.isdecimal():
        known = f"; choose from {', '.join(list(by_name)[:20])}" if by_name else "; give its index"
        raise UserError(f"unknown {kind} {label!r}{nearest(label, by_name)}{known}")
    try:
        index = int(label) if isinstance(label, str) else operator.index(label)
    except TypeError:
        raise UserError(f"a {kind} is a name or a whole number, not {label!r}") from None
    if not 0 <= index < num_classes:
        raise UserError(f"{kind} {label} is not one of this model's 0 to {num_classes - 1}")
    return index
