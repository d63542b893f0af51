"""lediflow: flow matching that starts at a learned prior, so that few steps suffice."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lediflow.errors import UserError
    from lediflow.gaussian import DiagonalGaussian
    from lediflow.networks.auxiliary import AuxiliaryModel
    from lediflow.networks.velocity import VelocityTransformer
    from lediflow.ode import integrate
    from lediflow.pipelines.boost import boost
    from lediflow.pipelines.flow_matching import FlowMatchingPipeline
    from lediflow.pipelines.lediflow import LeDiFlowPipeline
    from lediflow.pipelines.load import load_pipeline
    from lediflow.pipelines.upsample import FlowUpsamplePipeline
    from lediflow.training.config import load_config
    from lediflow.training.run import train

__version__ = "0.1.0"

__all__ = [
    "AuxiliaryModel",
    "DiagonalGaussian",
    "FlowMatchingPipeline",
    "FlowUpsamplePipeline",
    "LeDiFlowPipeline",
    "UserError",
    "VelocityTransformer",
    "boost",
    "integrate",
    "load_config",
    "load_pipeline",
    "train",
]

_HOMES = {
    "AuxiliaryModel": "networks.auxiliary",
    "DiagonalGaussian": "gaussian",
    "FlowMatchingPipeline": "pipelines.flow_matching",
    "FlowUpsamplePipeline": "pipelines.upsample",
    "LeDiFlowPipeline": "pipelines.lediflow",
    "UserError": "errors",
    "VelocityTransformer": "networks.velocity",
    "boost": "pipelines.boost",
    "integrate": "ode",
    "load_config": "training.config",
    "load_pipeline": "pipelines.load",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    # imported on first use: torch and diffusers take seconds, `lediflow --help` must not
    if name in _HOMES:
        return getattr(import_module(f"lediflow.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lediflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
