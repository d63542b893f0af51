"""Pixels <-> latents through a pretrained autoencoder of diffusers, and the measured scale of the latents."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lediflow.errors import UserError
from lediflow.gaussian import DiagonalGaussian
from lediflow.sources import put

CLASSES = ("AutoencoderKL", "AutoencoderTiny")


class Codec:
    """An AutoencoderKL or AutoencoderTiny behind one face, in the units that latent diffusion models use.

    A latent is (v - shift_factor) * scaling_factor, where v is what the autoencoder itself works with.

    Attributes:
        model: the autoencoder.
        name: folder (absolute) or Hub id that it came from.
        factor: pixels of a side that become one latent.
        channels: of the latents.
        in_channels: of the images.
    """

    def __init__(self, model: Any, name: str = "") -> None:
        """Wrap a loaded autoencoder."""
        config = model.config
        self.model, self.name = model, name
        self.scale = float(config.scaling_factor)
        self.shift = float(getattr(config, "shift_factor", None) or 0.0)
        self.channels = int(config.latent_channels)
        widths = getattr(config, "block_out_channels", None) or config.encoder_block_out_channels
        self.factor = 2 ** (len(widths) - 1)
        self.in_channels = int(config.in_channels)

    @classmethod
    def load(cls, name: str | Path, *, device: Any = "cpu", offline: bool = False) -> Codec:
        """Read an autoencoder from a folder (also a pipeline's, with `vae` inside) or a Hub id, in float32.

        Args:
            name: where it is.
            device: where to put it.
            offline: only what is on this machine; nothing is downloaded.

        Raises:
            UserError: there is none, it is of another class, or its weights are missing, damaged or pickled.
        """
        from diffusers import AutoencoderKL, AutoencoderTiny

        source = name = local_name(str(name))
        options: dict[str, Any] = {"use_safetensors": True, "local_files_only": offline}
        path = Path(name)
        if path.is_dir():
            if not (path / "config.json").is_file() and (path / "vae" / "config.json").is_file():
                source = str(path / "vae")
        elif path.is_absolute() or name.count("/") != 1:
            raise UserError(f"no codec {name!r}: give the folder of an autoencoder, or a Hub id owner/name")
        try:
            config, options = _config_of(source, options)
            kind = config.get("_class_name")
            if kind not in CLASSES:
                raise UserError(f"{name!r} is a {kind}, no codec; give one of {' or '.join(CLASSES)}")
            loader = AutoencoderKL if kind == "AutoencoderKL" else AutoencoderTiny
            model = loader.from_pretrained(source, **options)
        except UserError:
            raise
        except Exception as error:  # diffusers, the Hub and safetensors each raise their own kinds
            raise UserError(
                f"cannot load the codec {name!r}: {str(error).strip().splitlines()[0]}"
            ) from error
        return cls(model.eval().requires_grad_(False).to(device), name)

    @cached_property
    def hash(self) -> str:
        """Of its config and weights, 16 hex digits; take it before the weights change their precision."""
        return _digest(self.model)

    @property
    def has_variance(self) -> bool:
        """Whether it encodes to a distribution (AutoencoderKL) and not to a point (AutoencoderTiny)."""
        return type(self.model).__name__ == "AutoencoderKL"

    @torch.no_grad()
    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Encode images (B, C, H, W) in [-1, 1], sides multiples of `factor`.

        Returns:
            Mean and log-variance of the latents, (B, channels, H / factor, W / factor), float32. An
            autoencoder without variance gives log-variance -inf.
        """
        images = images.to(self.model.device, self.model.dtype)
        if not self.has_variance:
            mean = (self.model.encode(images).latents.float() - self.shift) * self.scale
            return DiagonalGaussian(mean, torch.full_like(mean, -torch.inf))
        posterior = self.model.encode(images).latent_dist
        mean = (posterior.mean.float() - self.shift) * self.scale
        return DiagonalGaussian(mean, posterior.logvar.float() + 2 * math.log(abs(self.scale)))

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 16) -> Tensor:
        """Decode latents (B, channels, h, w), `batch_size` at a time, to images (B, C, H, W) in [-1, 1]."""
        raw = (latents / self.scale + self.shift).to(self.model.device, self.model.dtype)
        images = [self.model.decode(part).sample.float() for part in raw.split(batch_size)]
        return torch.cat(images).clamp(-1, 1).to(latents.device)


@dataclass(frozen=True)
class LatentSpace:
    """What must be known of latents to train on them and to see them: their codec and measured scale.

    Attributes:
        codec: folder or Hub id of the codec.
        hash: of the codec's config and weights.
        factor: pixels of a side that become one latent.
        channels: of the latents.
        mean: per channel, over the training set.
        std: per channel, over the training set.
    """

    codec: str
    hash: str
    factor: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LatentSpace:
        """Undo `to_dict`; other keys are passed over."""
        space = cls(**{key: values[key] for key in cls.__dataclass_fields__})
        return replace(space, mean=tuple(space.mean), std=tuple(space.std))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    def normalize(self, latents: Tensor) -> Tensor:
        """Bring latents (..., channels, h, w) to mean 0 and standard deviation 1 per channel."""
        return (latents - self._column(self.mean, latents)) / self._column(self.std, latents)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Undo `normalize`."""
        return latents * self._column(self.std, latents) + self._column(self.mean, latents)

    def load_codec(self, *, device: Any = "cpu", name: str | None = None, offline: bool = False) -> Codec:
        """Load the codec from where it was, or from `name`.

        Raises:
            UserError: it is not there, or it is another one.
        """
        codec = Codec.load(name or self.codec, device=device, offline=offline)
        if codec.hash != self.hash:
            raise UserError(
                f"the codec {codec.name!r} is not the one that this model's latents were made with (hash "
                f"{codec.hash}, not {self.hash}); give the folder of the right one"
            )
        return codec

    @staticmethod
    def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
        return put(torch.tensor(values, dtype=like.dtype), like.device).view(-1, 1, 1)


def local_name(name: str) -> str:
    """Return a folder's absolute path, or a Hub id as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _config_of(source: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config and loading options of an autoencoder; a pipeline on the Hub keeps it in `vae`."""
    from diffusers import AutoencoderKL

    offline = {"local_files_only": options["local_files_only"]}
    if Path(source).is_dir():
        return AutoencoderKL.load_config(source), options
    try:
        return AutoencoderKL.load_config(source, subfolder="vae", **offline), options | {"subfolder": "vae"}
    except OSError:
        return AutoencoderKL.load_config(source, **offline), options


def _digest(model: Any) -> str:
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
