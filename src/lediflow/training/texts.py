"""What a frozen encoder makes of a run's texts: once before training, kept on disk, looked up in the loop.

The cache goes by content: by the encoder's weights and tokenizer, and by the texts. A run that resumes, and
another run of the same texts, encodes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lediflow.errors import UserError
from lediflow.files import default_cache, explained, quoted, read_json, write_text, written_whole
from lediflow.progress import Progress
from lediflow.text_encoders import TextEncoder
from lediflow.training.config import Config
from lediflow.training.processes import on_main

RECORD = "text_encoder.json"  # in the run folder: where the frozen encoder was, and its fingerprint
BATCH = 64
ON_DEVICE = 2**30  # bytes of embeddings that may lie beside the networks; more stay in main memory


class EncodedTexts:
    """The embeddings of distinct texts, and which of them each image has; indexed as a tensor (N, ...) is.

    Args:
        table: embeddings of the distinct texts, (n, rows, width).
        places: the text of each image, int64 (N,).
        device: where rows are wanted.
    """

    def __init__(self, table: Tensor, places: Tensor, device: torch.device) -> None:
        self.device = device
        home = device if table.nbytes <= ON_DEVICE else torch.device("cpu")
        self.table, self.places = table.to(home), places.to(home)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Tensor:
        """Return the embeddings of some images, by a slice or an index tensor."""
        chosen = index.to(self.places.device) if isinstance(index, Tensor) else index
        return self.table[self.places[chosen]].to(self.device)


class FrozenEncoder:
    """The frozen encoder of a run that starts; the main process holds it until the texts are encoded.

    Attributes:
        model: the encoder; None in other processes, and afterwards.
        record: what the run keeps of it; empty in other processes.
    """

    def __init__(self, model: TextEncoder | None) -> None:
        self.model = model
        self.record: dict[str, Any] = model.record() if model else {}

    def refuse_another(self, run: Path) -> None:
        """Raise UserError where the run's networks were trained with another encoder."""
        kept = kept_encoder(run)
        if kept and self.record and kept["fingerprint"] != self.record["fingerprint"]:
            raise UserError(
                f"{run} was trained with another text encoder, {quoted(kept['name'])} (fingerprint "
                f"{kept['fingerprint'][:12]}), than {quoted(self.record['name'])} is now "
                f"({self.record['fingerprint'][:12]}); give that one, or choose another --output"
            )

    def keep(self, run: Path) -> None:
        """Write into the run folder where the encoder was, where the pipelines take it from."""
        write_text(run / RECORD, json.dumps(self.record, indent=1))

    def encode(self, config: Config, texts: Sequence[str], accelerator: Accelerator) -> EncodedTexts:
        """Return what the encoder makes of the texts of all images, and let it go; all processes ask."""
        distinct = sorted(set(texts))
        files: list[str | None] = [None]

        def fill() -> None:
            assert self.model is not None, "the main process has it"
            path = _cache_file(self.model, config, distinct)
            if _read(path) is None:
                _write(path, _encoded(self.model, config, distinct))
            files[0] = str(path)

        on_main(accelerator, fill)
        self.model = None
        broadcast_object_list(files)
        table = _read(Path(files[0] or ""))
        if table is None:
            raise UserError(
                f"cannot read the encoded texts in {files[0]}; all processes must see that folder"
            )
        where = {text: i for i, text in enumerate(distinct)}
        return EncodedTexts(table, torch.tensor([where[text] for text in texts]), accelerator.device)


def settle_text(config: Config, accelerator: Accelerator) -> tuple[Config, FrozenEncoder | None]:
    """Return the config with the sizes of its frozen encoder, and the encoder; all processes ask.

    Raises:
        UserError: it cannot be loaded, or reads too few tokens.
    """
    name = config.text.encoder
    if name is None or not config.text.frozen:
        return config, None
    sizes: list[tuple[int, int] | None] = [None]
    loaded: list[TextEncoder] = []

    def load() -> None:
        encoder = TextEncoder.load(name, device=accelerator.device)
        length = min(config.text.max_length, encoder.most)
        encoder.check_length(length)
        sizes[0] = encoder.width, length
        loaded.append(encoder)

    on_main(accelerator, load)
    broadcast_object_list(sizes)
    width, length = sizes[0] or (0, 0)
    text = config.text.model_copy(update={"width": width, "max_length": length})
    return config.model_copy(update={"text": text}), FrozenEncoder(loaded[0] if loaded else None)


def made_up_texts(config: Config, count: int, device: torch.device) -> EncodedTexts:
    """Return embeddings of no text, for a rehearsal, of which only the size matters."""
    table = torch.ones(1, 1 + config.text.max_length * config.text.tokens, config.text.width).half()
    return EncodedTexts(table, torch.zeros(count, dtype=torch.long), device)


def kept_encoder(run: Path) -> dict[str, Any] | None:
    """Return the record of the run's frozen encoder, None if it has none."""
    path = run / RECORD
    return read_json(path, "train in another folder, for it tells what the words were encoded by")


def _encoded(encoder: TextEncoder, config: Config, texts: Sequence[str]) -> Tensor:
    told, parts = config.text, []
    with Progress("texts", 0, len(texts)) as progress:
        for start in range(0, len(texts), BATCH):
            some = texts[start : start + BATCH]
            parts.append(encoder.encode(some, told.max_length, tokens=told.tokens))
            progress.update(start + len(some), "encoded")
    return torch.cat(parts)


def _cache_file(encoder: TextEncoder, config: Config, texts: Sequence[str]) -> Path:
    said = json.dumps([encoder.fingerprint, config.text.max_length, config.text.tokens, *texts])
    name = hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
    return default_cache() / "texts" / f"{name}.safetensors"


def _read(path: Path) -> Tensor | None:
    try:
        return load_file(path)["texts"]
    except (OSError, SafetensorError, KeyError):  # none, or damaged: made again
        return None


def _write(path: Path, table: Tensor) -> None:
    with explained(path), written_whole(path) as unfinished:
        save_file({"texts": table}, unfinished)
