"""The models behind the page, loaded once, and which controls they need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lediflow.choices import SOLVERS
from lediflow.devices import DTYPES, check_device, settle_precision
from lediflow.errors import UserError
from lediflow.pipelines.base import ImagePipeline
from lediflow.pipelines.lediflow import LeDiFlowPipeline
from lediflow.pipelines.load import load_pipeline, load_upsampler
from lediflow.pipelines.upsample import FlowUpsamplePipeline


@dataclass
class Models:
    """What the page works with.

    Attributes:
        name: of the model, as the user gave it.
        pipeline: that makes images.
        weights: its digest, for the recipes.
        dtype: "fp32", "bf16" or "fp16".
        baseline: plain flow matching of the same run, to compare with; None where there is none.
        upsampler: None where none was given.
    """

    name: str
    pipeline: ImagePipeline
    weights: str
    dtype: str = "fp32"
    baseline: ImagePipeline | None = None
    upsampler: FlowUpsamplePipeline | None = None

    @classmethod
    def load(
        cls,
        model: str,
        *,
        upsampler: str | None = None,
        codec: str | None = None,
        text_encoder: str | None = None,
        device: str | None = None,
        dtype: str = "fp32",
    ) -> Models:
        """Load all that the page needs.

        Args:
            model: run folder, saved pipeline folder, Hub id, or the name of a built-in model.
            upsampler: likewise, of one that enlarges images; None for none.
            codec: folder or Hub id of the codec, where it is not where it was.
            text_encoder: likewise, of the frozen encoder of texts.
            device: name of one, or None for the best there is.
            dtype: "fp32", "bf16", "fp16" or "auto".

        Raises:
            UserError: a model cannot be loaded, or there is no such device or precision.
        """
        where = check_device(device)
        pipeline = load_pipeline(model).to(where)
        found = Path(model) / "baseline"
        baseline = None
        if isinstance(pipeline, LeDiFlowPipeline) and (found / "pipeline" / "model_index.json").is_file():
            baseline = load_pipeline(found).to(where)
        enlarging = None if upsampler is None else load_upsampler(upsampler).to(where)
        for one in (pipeline, baseline, enlarging):
            if one is not None:
                one.set_progress_bar_config(disable=True)
        if codec is not None:
            pipeline.load_codec(codec)
        if text_encoder is not None:
            pipeline.load_text_encoder(text_encoder)
        return cls(model, pipeline, pipeline.digest(), settle_precision(dtype, where), baseline, enlarging)

    @property
    def precision(self) -> Any:
        """What networks are autocast to."""
        return DTYPES[self.dtype]

    @property
    def learned(self) -> LeDiFlowPipeline | None:
        """The pipeline, where it starts at a learned prior and so has a latent z; else None."""
        return self.pipeline if isinstance(self.pipeline, LeDiFlowPipeline) else None

    def need_z(self) -> LeDiFlowPipeline:
        """Return the pipeline with a latent z.

        Raises:
            UserError: it is plain flow matching.
        """
        if self.learned is None:
            raise UserError(f"{self.name} is plain flow matching and has no latent z; give a LeDiFlow model")
        return self.learned

    # Which controls the page shows

    @property
    def takes_text(self) -> bool:
        """Whether the model is told text."""
        reads = getattr(self.pipeline, "reader", None) is not None  # a network of its is told text
        return bool(getattr(self.pipeline, "takes_text", reads))

    @property
    def classes(self) -> list[str]:
        """Names of the classes, numbers where they have none; empty for a model without."""
        return self.pipeline.class_names or [str(i) for i in range(self.pipeline.flow.classes())]

    @property
    def clusters(self) -> list[int]:
        """The clusters that have training images; empty for a model without."""
        clusters = self.pipeline.clusters
        return [] if clusters is None else clusters.images.sum(0).nonzero()[:, 0].tolist()

    @property
    def solvers(self) -> list[str]:
        """Solvers of the flow."""
        return [name for name in SOLVERS if name != "mean" or self.pipeline.flow.average_velocity]

    @property
    def latent_solvers(self) -> list[str]:
        """Solvers of the latent sampler; empty for a model without."""
        if self.learned is None:
            return []
        return [name for name in SOLVERS if name != "mean" or self.learned.sampler.average_velocity]

    @property
    def strengths(self) -> dict[str, tuple[float, float, float]]:
        """Of temperature and each guidance that the model can have: least, most, and its own."""
        best = self.pipeline.settle_strengths()
        found = {}
        for name, strength in self.pipeline.strengths().items():
            if strength.possible:
                low, high = strength.learned or strength.usual
                found[name] = (low, high, best[name])
        return found

    def class_labels(self, name: str | None) -> str | int | None:
        """Return a class as the pipeline takes it, None for no choice.

        Raises:
            UserError: there is no such class.
        """
        if not name:
            return None
        if name not in self.classes:
            raise UserError("there is no such class; choose one of the list")
        return name if self.pipeline.class_names else int(name)
