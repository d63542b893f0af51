"""Networks that turn images into the features that distances are taken in.

`open_features` knows any transformers vision model by folder or Hub id (CLIP, whose projected embeddings make
the CMMD; DINOv2; MobileNet; ...), and "inception", whose pool features make FID and KID. The classifier of
classifier.py, trained on the data themselves, is the third kind. Nothing downloaded is unpickled or run.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lediflow.errors import UserError
from lediflow.fingerprints import weights_digest
from lediflow.hub import is_cached, split_revision, why_unreachable
from lediflow.metrics.classifier import SmallClassifier
from lediflow.pictures import to_float, to_uint8

CLIP = "openai/clip-vit-large-patch14-336"  # of the published CMMD
# The commit of the published weights. It has no safetensors: its weights are read by torch.load, which takes
# nothing but tensors.
CLIP_COMMIT = "ce19dc912ca5cd21c8a653c79e251e808ccabcd1"
INCEPTION, CLASSIFIER = "inception", "classifier"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which preprocessor files hold


class FeatureNetwork(ABC):
    """Images (N, C, H, W) in [-1, 1] -> features (N, D), float32 on the CPU.

    Images are rounded to 8 bits first, for that is what a user looks at; grey ones are made RGB where the
    network takes RGB.

    Attributes:
        name: for tables, short.
        digest: identifies weights and preprocessing.
        frechet_name, mmd_name, kernel_name: what the Fréchet distance and the formulas of CMMD and KID are
            called in these features.
    """

    name: str
    digest: str
    frechet_name, mmd_name, kernel_name = "frechet", "mmd", "kernel"

    @property
    def headline(self) -> str:
        """The metric that plots and verdicts go by: one published for these features where there is one."""
        return self.mmd_name

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of images (N, C, H, W), uint8 or float in [-1, 1]."""
        pixels = images if images.dtype == torch.uint8 else to_uint8(images)
        return self._features(pixels.to(self.device)).flatten(1).float().cpu()

    @abstractmethod
    def _features(self, pixels: Tensor) -> Tensor:
        """Return features of uint8 pixels on the network's device."""


class ClassifierFeatures(FeatureNetwork):
    """The 64 features of a small classifier trained on the same data; compare within that data only.

    Attributes:
        classifier: the network.
    """

    def __init__(self, classifier: SmallClassifier, device: str | torch.device) -> None:
        super().__init__(device)
        self.name, self.classifier = CLASSIFIER, classifier.to(self.device)
        self.digest = _digest(classifier, "")

    @property
    def headline(self) -> str:
        """The Fréchet distance, for its floor in these features is known."""
        return self.frechet_name

    def _features(self, pixels: Tensor) -> Tensor:
        return self.classifier.features(to_float(pixels))


class InceptionFeatures(FeatureNetwork):
    """The 2048 pool features of the Inception network of the FID, by torch-fidelity.

    Raises:
        UserError: torch-fidelity, or the torchvision that it needs, does not import, or there are no weights,
            or they are not the published ones.
    """

    frechet_name, kernel_name = "fid", "kid"

    def __init__(self, device: str | torch.device) -> None:
        super().__init__(device)
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as fidelity
        except (ImportError, RuntimeError) as error:  # torchvision of another torch raises RuntimeError
            raise UserError(
                f"FID and KID need the packages torch-fidelity and torchvision, and they do not import here "
                f"({error}); pip install torch-fidelity, with the torchvision that belongs to your torch, or "
                "give --features a transformers vision model"
            ) from None
        weights = _inception_weights(fidelity.URL_INCEPTION_V3)
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))
        self.name, self._network = INCEPTION, network.to(self.device)
        self.digest = _digest(network, "2048")

    @property
    def headline(self) -> str:
        """FID."""
        return self.frechet_name

    def _features(self, pixels: Tensor) -> Tensor:
        return self._network(pixels.expand(-1, 3, -1, -1).contiguous())[0]


class TransformersFeatures(FeatureNetwork):
    """A vision model of transformers: CLIP's projected embedding, else the pooled output.

    The whole image is resized to the side that the model's preprocessor ends with, by its filter, with
    antialiasing, and nothing is cropped; then normalised by its mean and standard deviation.

    Args:
        model: folder or Hub id, `id@revision` for one revision.
        device: where it runs.

    Raises:
        UserError: as `load_model`.
    """

    def __init__(self, model: str, device: str | torch.device) -> None:
        super().__init__(device)
        self._network, self.preprocessing, _ = load_model(model, _vision_loader)
        # convolutions take two thirds of the time with the channels last; the digest does not see it
        self._network.to(self.device, memory_format=torch.channels_last)
        self.name = Path(model).name
        self.digest = _digest(self._network, repr(self.preprocessing))
        config = self._network.config
        sizes = tuple(getattr(config, key, 0) for key in ("image_size", "patch_size", "projection_dim"))
        if config.model_type == "clip_vision_model" and sizes == (336, 14, 768):
            self.mmd_name = "cmmd"

    def _features(self, pixels: Tensor) -> Tensor:
        values = self.preprocessing(to_float(pixels))
        return image_embedding(self._network, values.contiguous(memory_format=torch.channels_last))


class Preprocessing:
    """Images in [-1, 1] -> what a vision model takes, from the settings of its preprocessor file.

    Args:
        settings: contents of preprocessor_config.json.
        side: of the input, where the settings name none.
    """

    def __init__(self, settings: dict[str, Any], side: int) -> None:
        size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge")
        self.side = int(size or side)
        self.filter = _FILTERS.get(settings.get("resample", 3), "bicubic")
        factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1
        self.scale = 255 * factor
        normalise = settings.get("do_normalize", True)
        self.mean: list[float] = settings.get("image_mean", [0.5] * 3) if normalise else [0.0] * 3
        self.std: list[float] = settings.get("image_std", [0.5] * 3) if normalise else [1.0] * 3

    def __call__(self, images: Tensor) -> Tensor:
        """Return pixel_values (N, 3, side, side) of images (N, C, H, W) in [-1, 1]."""
        images = self.scale * (images + 1) / 2
        if images.shape[2:] != (self.side, self.side):
            images = F.interpolate(images, size=(self.side, self.side), mode=self.filter, antialias=True)
        mean, std = (torch.tensor(x, device=images.device).view(1, -1, 1, 1) for x in (self.mean, self.std))
        return (images.expand(-1, 3, -1, -1) - mean) / std

    def __repr__(self) -> str:
        return f"{self.filter} to {self.side}, times {self.scale:g}, mean {self.mean}, std {self.std}"


def open_features(name: str, device: str | torch.device) -> FeatureNetwork:
    """Return the feature network `name`: "inception", or a transformers vision model by folder or Hub id.

    Raises:
        UserError: it is unavailable, and why.
    """
    return InceptionFeatures(device) if name == INCEPTION else TransformersFeatures(name, device)


def _inception_weights(url: str) -> Path:
    """Return the file of the Inception weights, downloaded where torch.hub keeps its files, and verified.

    Given a file, torch-fidelity reads it by torch.load, which takes nothing but tensors.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            print("downloading the Inception network, once", file=sys.stderr, flush=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=INCEPTION_SHA256)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, RuntimeError) as error:  # torch.hub raises RuntimeError for a wrong hash
        raise UserError(f"cannot download the Inception weights from {url}: {error}") from None
    if found != INCEPTION_SHA256:
        raise UserError(
            f"{path} is not the published Inception network (its SHA-256 begins with {found[:8]}, not "
            f"{INCEPTION_SHA256[:8]}); delete it to download it again"
        )
    return path


def load_model(model: str, choose: Callable[[Any], Any]) -> tuple[Any, Preprocessing, dict[str, Any]]:
    """Load a model of transformers, frozen: no code but that of transformers itself.

    Weights are safetensors, but those of CLIP, which are pinned to one commit.

    Args:
        model: folder or Hub id, or id@revision.
        choose: for the model's config, the `from_pretrained` to load it with.

    Returns:
        The network in evaluation mode, its images' preprocessing, and what names it to `from_pretrained`.

    Raises:
        UserError: transformers is missing, or there is no such model, or it takes no images.
    """
    try:
        from transformers import AutoConfig
        from transformers.utils import logging
    except ImportError:
        raise UserError(
            "feature networks by name need the package transformers: pip install 'lediflow[eval]'"
        ) from None
    name, asked = split_revision(model)
    published = name == CLIP and asked in (None, CLIP_COMMIT) and not Path(name).exists()
    revision = CLIP_COMMIT if published else asked or ""
    weights = {"use_safetensors": False, "weights_only": True} if published else {"use_safetensors": True}
    # else transformers would take weights that a bot proposed, and nobody has accepted
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    source: dict[str, Any] = {"pretrained_model_name_or_path": name, "trust_remote_code": False}
    source |= {"revision": revision} if revision else {}
    here = Path(name).exists() or is_cached(name, "config.json", revision or None)
    if not here:
        _check_reachable(name, revision)
        print(f"downloading the network {name} from the Hub, once", file=sys.stderr, flush=True)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list the half of CLIP that is left out
    if here:
        logging.disable_progress_bar()  # a first download, of up to gigabytes, shows how far it is
    try:
        config = AutoConfig.from_pretrained(**source)
        network = choose(config)(**source, **weights)
        preprocessing = Preprocessing(_preprocessor_settings(name, revision), _input_side(config))
    except Exception as error:  # transformers, the Hub and safetensors each raise their own kinds
        first_line = str(error).partition("\n")[0]
        raise UserError(
            f"cannot load the network {model}: {first_line} It must be a folder or Hub id "
            "of a transformers vision model with safetensors weights"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    if network.main_input_name != "pixel_values" and not hasattr(network, "get_image_features"):
        raise UserError(f"{model} is a {config.model_type}, which takes no images; give a vision model")
    return network.eval().requires_grad_(False), preprocessing, source


def image_embedding(network: Any, pixel_values: Tensor) -> Tensor:
    """Return one vector for each image: the projected embedding, the pooled output, or the places' mean."""
    if hasattr(network, "get_image_features"):
        output = network.get_image_features(pixel_values=pixel_values)
        return output if isinstance(output, Tensor) else output.pooler_output.flatten(1)
    output = network(pixel_values=pixel_values)
    for name in ("image_embeds", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name).flatten(1)
    last = output.last_hidden_state
    return last.flatten(2).mean(2) if last.ndim == 4 else last.mean(1)


def _digest(network: nn.Module, preprocessing: str) -> str:
    text = weights_digest(network) + preprocessing
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _check_reachable(name: str, revision: str) -> None:
    """Make sure quickly that a model of the Hub can be asked for."""
    if reason := why_unreachable(name, "config.json", revision or None):
        raise UserError(
            f"the network {name} is neither a folder nor cached here, and cannot be fetched ({reason}); give "
            f"--features the folder of a transformers vision model, or {CLASSIFIER!r} where the data have "
            "classes"
        )


def _vision_loader(config: Any) -> Any:
    from transformers import AutoModel, CLIPVisionModelWithProjection

    if config.model_type == "clip":
        # the vision half alone, which reads the size of the embedding in its own half of the config
        config = config.vision_config.__class__(
            **config.vision_config.to_dict() | {"projection_dim": config.projection_dim}
        )
    if config.model_type == "clip_vision_model":
        return partial(CLIPVisionModelWithProjection.from_pretrained, config=config)
    return AutoModel.from_pretrained


def _input_side(config: Any) -> int:
    side = getattr(getattr(config, "vision_config", config), "image_size", 224)
    return side if isinstance(side, int) else side[0]


def _preprocessor_settings(name: str, revision: str) -> dict[str, Any]:
    # the file itself, for transformers' own processors need torchvision
    from transformers.utils import cached_file

    path = cached_file(
        name,
        "preprocessor_config.json",
        revision=revision or None,
        _raise_exceptions_for_missing_entries=False,
    )
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
