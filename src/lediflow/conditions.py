"""What a network is told besides the point x and the time t: named tensors, a row for each image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# what an image shows: classes and texts that somebody gave, and clusters that were found
LABELS = ("label", "cluster", "text")


class Conditions(Mapping[str, Tensor]):
    """Named tensors, (B, ...) each, some rows of which may be dropped.

    A network embeds each condition by its name: `z` (auxiliary latent), `label` (class), `cluster` (of z),
    `text` (its bytes), `guidance` (its strength), `augmentation` (what was done to the picture), `image`,
    `noise_level`. A dropped row counts as not given, which is what guidance compares with (arXiv 2207.12598).

    Attributes:
        dropped: by name, which rows are dropped, bool (B,); a name that is not there has none.
    """

    def __init__(self, *, dropped: Mapping[str, Tensor] | None = None, **values: Tensor | None) -> None:
        """Take the tensors by name; None stands for a condition that is not there."""
        self._values = {name: value for name, value in values.items() if value is not None}
        self.dropped = dict(dropped or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Conditions({', '.join(f'{name}={tuple(x.shape)}' for name, x in self.items())})"

    def also(self, **values: Tensor | None) -> Conditions:
        """Return these conditions and more."""
        return Conditions(dropped=self.dropped, **{**self._values, **values})

    def only(self, names: Iterable[str]) -> Conditions:
        """Return those of the conditions that are among `names`."""
        kept = [name for name in names if name in self._values]
        return Conditions(
            dropped={name: self.dropped[name] for name in kept if name in self.dropped},
            **{name: self._values[name] for name in kept},
        )

    def drop(self, names: str | Iterable[str], where: Tensor | None = None) -> Conditions:
        """Return the conditions with rows of some dropped, besides those that are dropped already.

        Args:
            names: of the conditions, one or several.
            where: which rows, bool (B,); None for all.

        Raises:
            KeyError: there is no such condition.
        """
        dropped = dict(self.dropped)
        for name in [names] if isinstance(names, str) else names:
            value = self._values[name]
            rows = torch.ones(len(value), dtype=torch.bool, device=value.device) if where is None else where
            dropped[name] = rows | dropped[name] if name in dropped else rows
        return Conditions(dropped=dropped, **self._values)

    @property
    def labels(self) -> list[str]:
        """Names of those of the `LABELS` that are there."""
        return [name for name in LABELS if name in self._values]

    def kinds(self) -> Tensor | None:
        """Return a number for each row, (B,), equal where all that says what it is of is equal.

        That is its labels, and what was done to its picture; None where nothing is said.
        """
        said = [self._values[name] for name in (*LABELS, "augmentation") if name in self._values]
        if not said:
            return None
        each = [torch.unique(value, dim=0, return_inverse=True)[1] for value in said]
        return torch.unique(torch.stack(each, dim=1), dim=0, return_inverse=True)[1]

    def rows(self, index: Any) -> Conditions:
        """Return some rows, by a slice, a list of indices or an index tensor."""
        return Conditions(
            dropped={name: where[index] for name, where in self.dropped.items()},
            **{name: value[index] for name, value in self._values.items()},
        )

    def to(self, device: torch.device | str) -> Conditions:
        """Return the same on a device."""
        return Conditions(
            dropped={name: where.to(device) for name, where in self.dropped.items()},
            **{name: value.to(device) for name, value in self._values.items()},
        )

    @classmethod
    def cat(cls, parts: Sequence[Conditions]) -> Conditions:
        """Return the rows of several, in order; all must have the same names.

        Raises:
            KeyError: a part lacks a condition that the first has.
        """
        values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        partly = [name for name in values if any(name in part.dropped for part in parts)]
        masks = {name: torch.cat([_mask(part, name) for part in parts]) for name in partly}
        return cls(dropped=masks, **values)


NOTHING = Conditions()


def _mask(conditions: Conditions, name: str) -> Tensor:
    """Which rows of a condition are dropped, also where none is."""
    if name in conditions.dropped:
        return conditions.dropped[name]
    value = conditions[name]
    return torch.zeros(len(value), dtype=torch.bool, device=value.device)
