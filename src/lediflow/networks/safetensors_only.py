"""Weights come from safetensors files only: unpickling a stranger's file would run their code."""

from __future__ import annotations

from typing import Any


class SafetensorsOnly:
    """Mixin before diffusers' own classes, which fall back to pickle files where safetensors are missing."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in diffusers, but never from a pickle file.

        Raises:
            OSError: the folder or Hub repository has no safetensors weights.
        """
        kwargs["use_safetensors"] = True
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
