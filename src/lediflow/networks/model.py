"""What every network of ours can do besides its mathematics: be saved, loaded, cast and compiled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lediflow.choices import Compile
from lediflow.conditions import Conditions


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
    """Mixin before ModelMixin: what training and sampling ask of every network, whatever it is made of.

    Buffers stay in fp32 when weights are cast.
    """

    # read by diffusers: the class name of the blocks, which are compiled, sharded and checkpointed one by one
    _repeated_blocks: list[str] = []  # noqa: RUF012
    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["time_features", "interval_features", "fourier", "z_mean", "z_std"]  # noqa: RUF012

    def slow_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that learn at a third of the rate."""
        return ()

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return the groups of AdamW: weights decay in matrices only, slow parameters learn at lr / 3."""
        slow = {id(p) for p in self.slow_parameters()}
        embeddings = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for p in self.parameters():
            if p.requires_grad:
                decays = p.ndim >= 2 and id(p) not in embeddings
                groups.setdefault((id(p) in slow, not decays), []).append(p)
        return [
            {
                "params": found,
                "lr": lr / 3 if is_slow else lr,
                "weight_decay": 0.0 if spared else weight_decay,
            }
            for (is_slow, spared), found in sorted(groups.items(), key=lambda group: group[0])
        ]

    def shard_units(self) -> list[nn.Module]:
        """Return the modules whose weights are gathered together when they are sharded."""
        return [m for m in self.modules() if type(m).__name__ in self._repeated_blocks]

    def classes(self, name: str = "label") -> int:
        """Return the number of classes of a condition, 0 where the network does not have it."""
        settings = (self.config.get("conditions") or {}).get(name)
        return settings["classes"] if settings else 0

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

    def uncompile(self) -> bool:
        """Undo `compile_as`; return whether anything was compiled."""
        compiled = [m for m in self.modules() if m._compiled_call_impl is not None]
        for module in compiled:
            module._compiled_call_impl = None
        return bool(compiled)

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


class VelocityNetwork(Protocol):
    """What a flow asks of its network; `VelocityTransformer` is one.

    A network that has this, and the rest of `Network`, trains, shards, compiles and samples like any other.

    Attributes:
        average_velocity: whether it takes r.
        config: diffusers' config, with `in_channels`, `sample_size` and `conditions`.
    """

    average_velocity: bool
    config: Any

    def __call__(self, x: Tensor, t: Tensor, conditions: Conditions = ..., r: Tensor | None = ...) -> Tensor:
        """Return v at x = phi_t, or u(x, t, r) for an r; see `VelocityTransformer.forward`."""

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return the groups of the optimiser."""

    def shard_units(self) -> list[nn.Module]:
        """Return the modules whose weights are gathered together when they are sharded."""

    def compile_as(self, how: Compile, **options: Any) -> None:
        """Compile the network in place."""
