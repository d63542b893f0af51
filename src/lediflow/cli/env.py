"""`lediflow env`: what this machine and installation are, for bug reports."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

from lediflow.cli.options import Json

PACKAGES = (
    "torch",
    "diffusers",
    "accelerate",
    "datasets",
    "transformers",
    "safetensors",
    "torchdiffeq",
    "pydantic",
    "typer",
    "numpy",
    "pillow",
)
EXTRAS = ("transformers", "torch-fidelity", "lpips", "torchvision", "natten", "wandb", "trackio")


def env(as_json: Json = False) -> None:
    """Print versions, devices, number formats and attention backends; paste it into a bug report.

    Example:

        lediflow env
    """
    report = _report()
    if as_json:
        print(json.dumps(report))
        return
    for section, facts in report.items():
        print(f"{section}:")
        for name, value in facts.items():
            print(f"  {name}: {value}")


def _report() -> dict[str, dict[str, Any]]:
    import os
    import platform

    import psutil
    import torch

    from lediflow import __version__
    from lediflow.choices import ATTENTION_BACKENDS
    from lediflow.devices import check_device, settle_precision
    from lediflow.networks.attention import missing_package

    best = check_device(None)
    devices: dict[str, Any] = {
        "cpu": f"{platform.processor() or platform.machine()}, {psutil.cpu_count(logical=True)} cores",
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "load": f"{psutil.getloadavg()[0]:.1f} over the last minute",
        "threads of torch": torch.get_num_threads(),
    }
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{properties.name}, {properties.total_memory / 1e9:.1f} GB"
    if torch.backends.mps.is_available():
        devices["mps"] = "available"
    return {
        "lediflow": {
            "version": __version__,
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "extras": {name: _version(name) for name in EXTRAS},
        "devices": devices,
        "defaults": {
            "device": str(best),
            "precision=auto": settle_precision("auto", best),
            "CUDA of torch": torch.version.cuda or "none",
        },
        "attention backends": {
            name: "available" if missing_package(name) is None else f"needs {missing_package(name)}"
            for name in ATTENTION_BACKENDS
        },
        "environment": {name: os.environ[name] for name in sorted(os.environ) if _matters(name)},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _matters(variable: str) -> bool:
    """Whether an environment variable changes what lediflow does; none of these holds a secret."""
    return variable.startswith(("LEDIFLOW_", "OMP_", "GOMP_", "MKL_NUM_", "CUDA_VISIBLE_", "HF_HUB_OFFLINE"))
