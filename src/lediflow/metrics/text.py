"""How well images fit the texts they were made from: the CLIP score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lediflow.errors import UserError
from lediflow.metrics.features import CLIP, image_embedding, load_model
from lediflow.pictures import to_float, to_uint8


class ClipScore:
    """100 max(cos, 0) between the CLIP embeddings of an image and its text.

    Hessel et al., "CLIPScore: a reference-free evaluation metric for image captioning" (2021), with the
    factor 100 that text-to-image papers use instead of 2.5.

    Args:
        model: CLIP by folder or Hub id, with its tokenizer.
        device: where it runs.

    Raises:
        UserError: transformers is missing, or there is no such model, or it is no CLIP.
    """

    def __init__(self, model: str = CLIP, device: str | torch.device = "cpu") -> None:
        def clip(config: Any) -> Any:
            from transformers import CLIPModel

            if config.model_type != "clip":
                raise ValueError(f"it is a {config.model_type}, and the CLIP score needs a CLIP.")
            return CLIPModel.from_pretrained

        self._device = torch.device(device)
        self._network, self._preprocessing, source = load_model(model, clip)
        self._network.to(self._device)
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(**source)

    @torch.no_grad()
    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Return the score of each pair, (N,), 0 to 100; higher is better.

        Args:
            images: (N, C, H, W), C 1 or 3, uint8 or float in [-1, 1].
            texts: N of them; beyond the model's 77 tokens they are cut off.

        Raises:
            UserError: not one text for each image.
        """
        if len(images) != len(texts):
            raise UserError(f"each image needs its text: {len(images)} images, {len(texts)} texts")
        pixels = images if images.dtype == torch.uint8 else to_uint8(images)
        seen = image_embedding(self._network, self._preprocessing(to_float(pixels.to(self._device))))
        tokens = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        read = self._network.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        read = read if isinstance(read, Tensor) else read.pooler_output
        return 100 * F.cosine_similarity(seen.double(), read.double()).clamp(min=0).cpu()
