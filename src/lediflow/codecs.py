"""Pixels <-> latents through a pretrained autoencoder of diffusers, and the measured scale of the latents."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lediflow.devices import to_device
from lediflow.errors import UserError
from lediflow.gaussian import DiagonalGaussian
from lediflow.hub import split_revision

CLASSES = ("AutoencoderKL", "AutoencoderTiny", "VQModel")
_UNITS = ("shift_factor", "latents_mean", "latents_std")  # of latents, beside scaling_factor


class Codec:
    """An autoencoder of `CLASSES` behind one face, in the units that latent diffusion models use.

    A latent is (v - shift_factor - latents_mean) * scaling_factor / latents_std, where v is what the
    autoencoder itself works with; most have only some of these.

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
        self.mean: Any = getattr(config, "latents_mean", None)
        self.std: Any = getattr(config, "latents_std", None)
        widths = getattr(config, "block_out_channels", None) or config.encoder_block_out_channels
        self.factor = 2 ** (len(widths) - 1)
        self.in_channels = int(config.in_channels)

    @classmethod
    def load(cls, name: str | Path, *, device: Any = "cpu", offline: bool = False) -> Codec:
        """Read an autoencoder from a folder (also a pipeline's, with `vae` inside) or a Hub id, in float32.

        A Hub id may end with ``@revision``.

        Args:
            name: where it is.
            device: where to put it.
            offline: only what is on this machine; nothing is downloaded.

        Raises:
            UserError: there is none, it is of another class, or its weights are missing, damaged or pickled.
        """
        import diffusers

        name = local_name(str(name))
        options: dict[str, Any] = {"use_safetensors": True, "local_files_only": offline}
        source, options["revision"] = split_revision(name)
        path = Path(source)
        if path.is_dir():
            if not (path / "config.json").is_file() and (path / "vae" / "config.json").is_file():
                source = str(path / "vae")
        elif path.is_absolute() or source.count("/") != 1:
            raise UserError(f"no codec {name!r}: give the folder of an autoencoder, or a Hub id owner/name")
        try:
            config, options = _config_of(source, options)
            kind = config.get("_class_name")
            if kind not in CLASSES:
                raise UserError(f"{name!r} is a {kind}, no codec; give one of {' or '.join(CLASSES)}")
            model = getattr(diffusers, kind).from_pretrained(source, **options)
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
        """Whether it encodes to a distribution (AutoencoderKL) and not to a point (the others)."""
        return type(self.model).__name__ == "AutoencoderKL"

    @torch.no_grad()
    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Encode images (B, C, H, W) in [-1, 1], sides multiples of `factor`.

        Returns:
            Mean and log-variance of the latents, (B, channels, H / factor, W / factor), float32. An
            autoencoder without variance gives log-variance -inf.
        """
        with self._not_overflowing():
            encoded = self.model.encode(images.to(self.device, self.model.dtype))
        if not self.has_variance:
            mean = self._to_units(encoded.latents.float())
            return DiagonalGaussian(mean, torch.full_like(mean, -torch.inf))
        mean, log_var = encoded.latent_dist.mean.float(), encoded.latent_dist.logvar.float()
        log_var = log_var + 2 * math.log(abs(self.scale))
        if self._standardised:
            log_var = log_var - 2 * _column(self.std, log_var).log()
        return DiagonalGaussian(self._to_units(mean), log_var)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 16) -> Tensor:
        """Decode latents (B, channels, h, w), `batch_size` at a time, to images (B, C, H, W) in [-1, 1]."""
        raw = self._from_units(latents)
        with self._not_overflowing():
            raw = raw.to(self.device, self.model.dtype)
            parts = [self.model.decode(part).sample.float() for part in raw.split(batch_size)]
        # in place, for one large image may be most of what memory holds
        images = torch.cat(parts) if len(parts) > 1 else parts[0]
        return images.clamp_(-1, 1).to(latents.device)

    @property
    def device(self) -> torch.device:
        """Where it computes: under diffusers' offloading that is not where its weights wait."""
        hook = getattr(self.model, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or self.model.device)

    @property
    def _standardised(self) -> bool:
        return self.mean is not None and self.std is not None  # diffusers' pipelines ask for both

    def _to_units(self, raw: Tensor) -> Tensor:
        if self._standardised:
            raw = (raw - _column(self.mean, raw)) / _column(self.std, raw)
        return (raw - self.shift) * self.scale

    def _from_units(self, latents: Tensor) -> Tensor:
        raw = latents / self.scale + self.shift
        if self._standardised:
            raw = raw * _column(self.std, raw) + _column(self.mean, raw)
        return raw

    @contextmanager
    def _not_overflowing(self) -> Iterator[None]:
        """In float32 where the autoencoder says that float16 overflows, as diffusers' pipelines do."""
        dtype = self.model.dtype
        upcast = dtype == torch.float16 and bool(getattr(self.model.config, "force_upcast", False))
        if upcast:
            self.model.to(torch.float32)
        try:
            yield
        finally:
            if upcast:
                self.model.to(dtype)


@dataclass(frozen=True)
class CodecSpace:
    """What must be known of latents to train on them and to see them: their codec and measured scale.

    Attributes:
        codec: folder or Hub id of the codec.
        hash: of the codec's config and weights.
        factor: pixels of a side that become one latent.
        channels: of the latents.
        mean: per channel, over the training set.
        std: per channel, over the training set.
        latent_hash: of what decides the latents (`latent_digest`); "" in what was made before there was one.
    """

    codec: str
    hash: str
    factor: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    latent_hash: str = ""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CodecSpace:
        """Undo `to_dict`; other keys are passed over."""
        known = {"latent_hash": "", **values}
        space = cls(**{key: known[key] for key in cls.__dataclass_fields__})
        return replace(space, mean=tuple(space.mean), std=tuple(space.std))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    def normalize(self, latents: Tensor) -> Tensor:
        """Bring latents (..., channels, h, w) to mean 0 and standard deviation 1 per channel."""
        return (latents - _column(self.mean, latents)) / _column(self.std, latents)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Undo `normalize`."""
        return latents * _column(self.std, latents) + _column(self.mean, latents)

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

    def check(self, model: Any) -> None:
        """Refuse a loaded autoencoder, of any precision, whose latents are others than these.

        Another decoder for the same latents is welcome: many share an encoder.

        Raises:
            UserError: its latents are others.
        """
        same = latent_digest(model) == self.latent_hash if self.latent_hash else _digest(model) == self.hash
        if same:
            return
        codec, advice = Codec(model), ""
        if (codec.channels, codec.factor) != (self.channels, self.factor):
            difference = f"{codec.channels} channels of 1/{codec.factor} of a side"
        else:
            difference = "others, though of the same shape"
            if not self.latent_hash and model.dtype != torch.float32:
                advice = " (it may be the right one if you load it in float32)"
        raise UserError(
            f"this codec's latents are {difference}; the model was trained on those of {self.codec!r} "
            f"({self.channels} channels of 1/{self.factor}); take a model that was trained for this "
            f"codec, or that codec{advice}"
        )


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Return a number for each channel, to be broadcast over (..., channels, h, w)."""
    return to_device(torch.tensor(values, dtype=like.dtype), like.device).view(-1, 1, 1)


def local_name(name: str) -> str:
    """Return a folder's absolute path, or a Hub id as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _config_of(source: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config and loading options of an autoencoder; a pipeline on the Hub keeps it in `vae`."""
    from diffusers import AutoencoderKL

    asked = {key: options[key] for key in ("local_files_only", "revision")}
    if Path(source).is_dir():
        return AutoencoderKL.load_config(source), options
    try:
        return AutoencoderKL.load_config(source, subfolder="vae", **asked), options | {"subfolder": "vae"}
    except OSError:
        return AutoencoderKL.load_config(source, **asked), options


def latent_digest(model: Any) -> str:
    """Return a digest of what decides an autoencoder's latents: its encoder, and the units, 16 hex digits.

    Of the weights only the signs count, which are the same in float32, bfloat16 and float16.
    """
    units = [getattr(model.config, name, None) for name in ("scaling_factor", *_UNITS)]
    digest = hashlib.sha256(json.dumps([type(model).__name__, units]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(torch.signbit(tensor).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(model: Any) -> str:
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
