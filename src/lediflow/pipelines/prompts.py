"""From the texts that a request asks for to what a network is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from lediflow.errors import UserError
from lediflow.networks.text import text_bytes
from lediflow.pipelines.labels import warn_of_cut
from lediflow.text_encoders import TextEncoder, load_recorded

REMEMBERED = 256  # texts whose embeddings are kept, so that the batches of a request encode each once


class PromptReader(DiffusionPipeline):
    """A pipeline that may be told texts, by their bytes or by a frozen encoder.

    A frozen encoder is no part of the pipeline: it is recorded in the config as `prompt_encoder`, loaded when
    the first prompt comes, and not saved.
    """

    _encoder: TextEncoder | None = None
    _remembered: dict[str, Tensor] | None = None

    @property
    def reader(self) -> Any:
        """The network that is told texts; None for a model without."""
        networks = (self.components.get(name) for name in ("flow", "sampler"))
        return next((n for n in networks if n is not None and "text" in (n.config.conditions or ())), None)

    def load_text_encoder(self, name: str | Path | None = None) -> None:
        """Load the frozen encoder of texts from where it was in training, or from `name`.

        Raises:
            UserError: the model has none, or it is not there, or it is another one.
        """
        record = self.config.get("prompt_encoder")
        if record is None:
            raise UserError("this model reads no prompts with a frozen text encoder; leave it out")
        self._encoder = load_recorded(record, name, device=self.device)
        self._remembered = {}

    def told(self, texts: Sequence[str]) -> Tensor:
        """Return texts as the network is told them, a row for each, on the CPU.

        Raises:
            UserError: they need a frozen encoder that is not there.
        """
        settings = self.reader.config.conditions["text"]
        if settings["embedder"] == "characters":
            return text_bytes(texts, settings["length"])
        if self._encoder is None:
            self.load_text_encoder()
        assert self._encoder is not None and self._remembered is not None, "it was loaded"
        known = self._remembered
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if len(known) + len(new) > REMEMBERED:
            known.clear()
            new = list(dict.fromkeys(texts))
        if new:
            self._encoder.model.to(self.device)
            rows = self._encoder.encode(new, settings["length"], tokens=settings["tokens"])
            known.update(zip(new, rows, strict=True))
        shape = (1 + settings["length"] * settings["tokens"], settings["features"])
        return torch.stack([known[text] for text in texts]) if texts else torch.zeros(0, *shape).half()

    def check_told(self, texts: Sequence[str]) -> None:
        """Load what texts need, and warn of one that is cut; for texts that `check_prompt` let through.

        Raises:
            UserError: they need a frozen encoder that is not there.
        """
        self.told(texts[:0])
        if self._encoder is not None:
            length = self.reader.config.conditions["text"]["length"]
            warn_of_cut(self._encoder.cut(texts, length), length, "tokens")
