"""One process or many: devices, copies or shards of the weights, and what one process does for all.

The engine is Accelerate: it finds out from the environment that `torchrun` or `accelerate launch` made
whether there are other processes, and copies the weights (DDP). Shards (FSDP2) are torch's own
`fully_shard`, which Accelerate leaves out where there is no GPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lediflow.devices import check_device, settle_precision
from lediflow.errors import UserError
from lediflow.training.config import TrainingConfig

ACCELERATE_DEVICE = "ACCELERATE_TORCH_DEVICE"


def make_accelerator(training: TrainingConfig, device: str | None, **options: Any) -> Accelerator:
    """Return the Accelerate engine for a precision and a device, joined with the other processes, if any.

    Args:
        training: its precision and parallel are read.
        device: "cpu", "cuda" or "mps"; None for the best there is.
        options: further arguments of Accelerator.

    Raises:
        UserError: a device that is unknown or not there, or a precision that it does not have.
    """
    where = check_device(device)
    kind, precision = where.type, settle_precision(training.precision, where)
    if precision == "fp16" and kind != "cuda":
        raise UserError(f"training.precision=fp16 needs a CUDA GPU, not {kind}; use bf16 or fp32")
    if precision == "fp16" and training.parallel == "fsdp":
        raise UserError("training.parallel=fsdp does not scale losses, as fp16 needs; use bf16 or fp32")
    for engine in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true":
            raise UserError(
                f"accelerate was configured to use {engine}; launch without it and choose with "
                "--set training.parallel=ddp or fsdp"
            )
    if where.index is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--device {where} names one GPU, and several processes were launched; use cuda")
    # one process may train several runs, in other precisions
    AcceleratorState._reset_state(reset_partial_state=True)
    # buffers are equal on all processes from the start: nothing changes them between steps
    copies = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    with _asked_for(where):
        return Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            cpu=kind == "cpu",
            kwargs_handlers=[copies],
            **options,
        )


@contextmanager
def _asked_for(device: torch.device) -> Iterator[None]:
    """Let Accelerate take this GPU, where one is named; it reads that from the environment."""
    if device.index is None:
        yield
        return
    before = os.environ.get(ACCELERATE_DEVICE)
    os.environ[ACCELERATE_DEVICE] = str(device)
    try:
        yield
    finally:
        if before is None:
            del os.environ[ACCELERATE_DEVICE]
        else:
            os.environ[ACCELERATE_DEVICE] = before


def is_main_process() -> bool:
    """Whether this process is the one that prints, and writes what all share."""
    return PartialState().is_main_process


def shard(network: Any, accelerator: Accelerator) -> None:
    """Cut the weights over the processes in place (FSDP2), unit by unit."""
    # torch warns of in-place changes to a network's output; the losses make none
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = torch.distributed.init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for unit in network.shard_units():
        fully_shard(unit, mesh=mesh)
    fully_shard(network, mesh=mesh)


@contextmanager
def gradients(model: nn.Module, accelerator: Accelerator, *, complete: bool) -> Iterator[None]:
    """Run a forward and backward pass; the processes exchange gradients only when they are `complete`."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(complete)
    unfinished = not complete and not isinstance(model, FSDPModule)
    with accelerator.no_sync(model) if unfinished else nullcontext():
        yield


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor in one piece; of a sharded one every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in one piece as the shards that `like` has, on its device."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def on_main(accelerator: Accelerator, act: Callable[[], object]) -> None:
    """Let the main process act while the others wait; if it fails, all fail.

    Raises:
        UserError: what `act` raised, on the main process; that it failed, on the others.
    """
    failure: UserError | None = None
    if accelerator.is_main_process:
        try:
            act()
        except UserError as error:
            failure = error
    failed = torch.tensor(float(failure is not None), device=accelerator.device)
    if accelerator.reduce(failed, "sum") > 0:
        raise failure or UserError("the main process failed; its message says why")
