"""Names that a user chooses from; without torch, for the command line offers them in --help."""

from __future__ import annotations

from typing import Literal, get_args

Solver = Literal["euler", "midpoint", "heun2", "heun3", "rk4", "dopri5", "mean"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Compile = Literal["none", "blocks", "model"]
AttentionBackend = Literal["dense", "tiles", "flex", "natten"]
Tracker = Literal["tensorboard", "wandb", "trackio", "none"]

SOLVERS: tuple[str, ...] = get_args(Solver)
ATTENTION_BACKENDS: tuple[str, ...] = get_args(AttentionBackend)
ExportFormat = Literal["onnx", "torch"]
