"""Frozen encoders of texts: a text model of transformers, by folder or Hub id, and what it makes of texts.

A text becomes one vector and, where they are asked for, one for each of its tokens. CLIP's vector is its own
(the state at the end of the text); every other model's is the mean over the tokens. Weights are safetensors,
and no code runs but that of transformers.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lediflow.codecs import local_name
from lediflow.errors import UserError
from lediflow.files import quoted
from lediflow.fingerprints import weights_digest
from lediflow.hub import is_cached, split_revision, why_unreachable
from lediflow.networks.text import plain_words

_CLIP = ("clip", "clip_text_model")
_PROBE = "A photo of 3 RED hearts, naïve café"  # its tokens tell tokenizers apart
_LARGEST = torch.finfo(torch.float16).max


class TextEncoder:
    """A text model of transformers and its tokenizer, frozen, in float32.

    Attributes:
        name: folder (absolute) or Hub id that it came from.
        revision: commit on the Hub; None for a folder.
        fingerprint: of weights and tokenizer, 32 hex digits.
        width: of its vectors.
        most: tokens that it can read of a text.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "", revision: str | None = None) -> None:
        """Wrap a loaded model; raises ValueError where it takes no text."""
        self.model, self.tokenizer, self.name, self.revision = model, tokenizer, name, revision
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # behind the mask, so any will do
        positions = getattr(model.config, "max_position_embeddings", None) or 10**6
        self.most = min(int(tokenizer.model_max_length), positions)
        self.width = int(self._read([_PROBE], min(self.most, 64))[0].shape[-1])
        seen = f"{weights_digest(model)}{tokenizer(_PROBE)['input_ids']}"
        self.fingerprint = hashlib.blake2b(seen.encode(), digest_size=16).hexdigest()

    @classmethod
    def load(cls, name: str | Path, *, device: Any = "cpu") -> TextEncoder:
        """Read an encoder from a folder or a Hub id, which may end with ``@revision``.

        Raises:
            UserError: transformers is missing, or there is no such model, or its weights are damaged, pickled
                or not all there, or it takes no text.
        """
        name = local_name(str(name))
        source, revision = split_revision(name)
        _check_there(source, revision)
        try:
            with _quiet():
                model, tokenizer, commit = _load(source, revision)
                model = model.eval().requires_grad_(False).to(device)
                return cls(model, tokenizer, source, commit)
        except UserError:
            raise
        except Exception as error:  # transformers, the Hub and safetensors each raise their own kinds
            reason = [*str(error).strip().splitlines(), type(error).__name__][0]
            raise UserError(
                f"cannot load the text encoder {quoted(name)}: {reason} It must be a text model of "
                "transformers with its tokenizer and safetensors weights"
            ) from None

    def record(self) -> dict[str, Any]:
        """Return what a model keeps to find its encoder again (`load_recorded`), for JSON."""
        return {"name": self.name, "revision": self.revision, "fingerprint": self.fingerprint}

    def check_length(self, length: int) -> None:
        """Refuse to read so few tokens that nothing of a text is among them; raises UserError."""
        marks = int(self.tokenizer.num_special_tokens_to_add())
        if length <= marks:
            raise UserError(
                f"text.max_length {length} leaves no room for words: this encoder adds {marks} marks to "
                "every text"
            )

    def encode(self, texts: Sequence[str], length: int, *, tokens: bool) -> Tensor:
        """Return what the encoder makes of texts; all 0 for one without words.

        Args:
            texts: N of them.
            length: tokens that are read of a text; what is longer is cut.
            tokens: each token's vector too.

        Returns:
            (N, 1, width), or with `tokens` (N, 1 + length, width) with zeros behind a text's end; float16,
            on the CPU.
        """
        rows = torch.zeros(len(texts), 1 + length * tokens, self.width, dtype=torch.float16)
        told = [i for i, text in enumerate(texts) if plain_words(text)]
        if told:
            pooled, each = self._read([texts[i] for i in told], length)
            rows[told, 0] = _half(pooled)
            if tokens:
                rows[told, 1 : 1 + each.shape[1]] = _half(each)
        return rows

    def cut(self, texts: Sequence[str], length: int) -> list[str]:
        """Return those of the texts that are longer than so many tokens."""
        read = self.tokenizer(list(texts), verbose=False)["input_ids"]
        return [text for text, ids in zip(texts, read, strict=True) if len(ids) > length]

    @torch.no_grad()
    def _read(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Return a vector for each text, (N, width), and for each token, (N, n, width), 0 behind the end."""
        device = next(self.model.parameters()).device
        read = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        there = read["attention_mask"].to(device)
        with torch.autocast(device.type, enabled=False):
            output = self.model(input_ids=read["input_ids"].to(device), attention_mask=there)
        each = output.last_hidden_state * there[..., None]
        if self.model.config.model_type in _CLIP:
            return output.pooler_output, each
        return each.sum(1) / there.sum(1, keepdim=True), each


def load_recorded(record: Mapping[str, Any], name: str | Path | None = None, *, device: Any) -> TextEncoder:
    """Load the encoder that a model was trained with.

    Args:
        record: from `TextEncoder.record`.
        name: where it is now; None for where it was.
        device: where to put it.

    Raises:
        UserError: it is not there, or it is another one.
    """
    was = f"{record['name']}@{record['revision']}" if record["revision"] else record["name"]
    try:
        encoder = TextEncoder.load(was if name is None else name, device=device)
    except UserError as error:
        raise UserError(
            f"{error}. The model reads prompts with the text encoder {quoted(record['name'])}: give its "
            "folder to `lediflow sample` or `lediflow app` as --text-encoder, or to load_text_encoder(FOLDER)"
        ) from None
    if encoder.fingerprint != record["fingerprint"]:
        raise UserError(
            f"the text encoder {quoted(encoder.name)} is not the one that this model was trained with, "
            f"{quoted(record['name'])} (fingerprint {encoder.fingerprint[:12]}, not "
            f"{record['fingerprint'][:12]}); give the folder of the right one as --text-encoder"
        )
    return encoder


def _check_there(source: str, revision: str | None) -> None:
    """Tell quickly where no model can be had."""
    path = Path(source)
    if path.is_dir():
        return
    if path.is_absolute() or source.count("/") != 1 or source.startswith((".", "~")):
        raise UserError(
            f"no text encoder {quoted(source)}: give `characters`, the folder of a text model of "
            "transformers, or a Hub id owner/name"
        )
    if is_cached(source, "config.json", revision):
        return
    if reason := why_unreachable(source, "config.json", revision):
        raise UserError(
            f"the text encoder {source} is neither a folder nor cached here, and the Hub does not give it "
            f"({reason})"
        )
    print(f"downloading the text encoder {source} from the Hub, once", file=sys.stderr, flush=True)


def _load(source: str, revision: str | None) -> tuple[Any, Any, str | None]:
    """Return model, tokenizer and commit."""
    from transformers import (
        MODEL_FOR_TEXT_ENCODING_MAPPING,
        AutoConfig,
        AutoModel,
        AutoModelForTextEncoding,
        AutoTokenizer,
        CLIPTextModel,
    )

    asked: dict[str, Any] = {"trust_remote_code": False}
    asked |= {"revision": revision} if revision else {}
    config = AutoConfig.from_pretrained(source, **asked)
    kind: Any = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    if config.model_type in _CLIP:
        kind, asked = CLIPTextModel, {key: asked[key] for key in asked if key == "revision"}
    model, info = kind.from_pretrained(
        source, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **asked
    )
    # transformers would make them up; poolers are not asked, but for CLIP's, which has no weights
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise ValueError(f"its weights lack {missing[0]}.")
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    tokenizer = AutoTokenizer.from_pretrained(source, **asked)
    return model, tokenizer, getattr(config, "_commit_hash", None)


@contextmanager
def _quiet():
    """Let transformers say nothing of what it loads."""
    try:
        from transformers.utils import logging
    except ImportError:
        raise UserError(
            "a frozen text encoder needs the package transformers: pip install 'lediflow[text]'"
        ) from None
    # else transformers would take weights that a bot proposed, and nobody has accepted
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def _half(x: Tensor) -> Tensor:
    """Return what is kept of embeddings; some models have a few numbers beyond float16."""
    return x.clamp(-_LARGEST, _LARGEST).to("cpu", torch.float16)
