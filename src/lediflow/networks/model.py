"""What every network of ours can do besides its mathematics: be saved, loaded, cast and compiled."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

Compile = Literal["none", "blocks", "model"]


class SafetensorsOnly:
    """Mixin before diffusers' own classes, which fall back to pickle files where safetensors are missing.

    Unpickling a stranger's file would run their code.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in diffusers, but never from a pickle file.

        Raises:
            OSError: the folder or Hub repository has no safetensors weights.
        """
        kwargs["use_safetensors"] = True
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]


class Network(SafetensorsOnly, nn.Module):
    """Mixin before ModelMixin: buffers stay in fp32 when weights are cast, and compiling is by name."""

    # read by diffusers
    _repeated_blocks = ["Block"]  # noqa: RUF012
    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["time_features", "interval_features", "latent_mean", "latent_std"]  # noqa: RUF012

    def compile_as(self, how: Compile, **options: Any) -> None:
        """Compile the repeated block or the whole network in place; the names of the weights stay.

        Args:
            how: "none" leaves the network alone.
            options: of torch.compile.
        """
        if how == "model":
            self.compile(**options)
        elif how == "blocks":
            self.compile_repeated_blocks(**options)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As torch.nn.Module.to; diffusers' own warns of buffers that `_apply` keeps right."""
        return nn.Module.to(self, *args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Fourier frequencies and statistics rounded to bf16 are other frequencies and statistics
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self.get_buffer(name)
            if new.dtype != old.dtype == torch.float32 and not old.is_meta:
                owner, _, last = name.rpartition(".")
                self.get_submodule(owner)._buffers[last] = old.to(new.device)
        return self
