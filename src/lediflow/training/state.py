"""All that a training step changes and a checkpoint keeps: weights, averages, optimiser, guard.

Tensors may be held whole or in shards; on the disk they are whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from lediflow.errors import UserError
from lediflow.files import explained, remove_folder
from lediflow.training import checkpoint
from lediflow.training.averages import Averages
from lediflow.training.guard import Guard
from lediflow.training.objectives import Objective
from lediflow.training.processes import cut_like, local, on_main, shard, whole


class TrainingState:
    """The state of a stage's training.

    Args:
        stage: whose network is trained; it is compiled and sharded here, as the config says.
        folder: where the checkpoints lie.
        accelerator: from `processes.make_accelerator`.

    Attributes:
        model: what the stage's loss calls, a wrapper of the network where there are several processes.
        parameters: of the network.
        optimizer: AdamW.
        base_rates: the learning rate of each of its groups, before warm-up and schedule.
        averages: of the weights.
        guard: the judge of losses.
        position: where a stream of images stands in this process; None for data that needs none.
    """

    def __init__(self, stage: Objective, folder: Path, accelerator: Accelerator):
        self.stage, self.folder, self.accelerator = stage, folder, accelerator
        self.training, self.network = stage.config.training, stage.network
        if self.training.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self.network.compile_as(self.training.compile)
        self.sharded = self.training.parallel == "fsdp" and accelerator.num_processes > 1
        if self.sharded:
            shard(self.network, accelerator)
        settings = stage.settings
        groups = self.network.parameter_groups(settings.learning_rate, settings.weight_decay)
        self.base_rates = [group["lr"] for group in groups]
        fused = accelerator.device.type in ("cpu", "cuda")
        self.optimizer = accelerator.prepare(torch.optim.AdamW(groups, betas=settings.betas, fused=fused))
        self.model = self.network if self.sharded else accelerator.prepare(self.network)
        self.parameters = list(self.network.parameters())
        self.averages = Averages(self.parameters, self.training.ema, settings.batch_size)
        self.guard = Guard()
        self.position: dict[str, Any] | None = None

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, ascending."""
        return checkpoint.steps_on_disk(self.folder)

    def good_steps(self) -> list[int]:
        """Return those whose checkpoint was not written amid bad steps."""
        return [s for s in self.steps() if not checkpoint.load_state(self.path(s))["guard"]["bad"]]

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / f"step-{step}"

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Let the stage's network have the first average for a while; all processes must ask."""
        if not self.sharded:
            with self.averages.used_by(self.parameters):
                self.network.eval()
                yield
            self.network.train()
            return
        copy = self.stage.build().to(self.accelerator.device).eval()
        with torch.no_grad():
            for parameter, average in zip(copy.parameters(), self.averages.first, strict=True):
                parameter.copy_(whole(average))
        copy.load_state_dict(dict(self.network.named_buffers()), strict=False)
        self.stage.network = copy
        try:
            yield
        finally:
            self.stage.network = self.network
            self.network.load_state_dict(dict(copy.named_buffers()), strict=False)

    def save(
        self, step: int, must_agree: dict[str, Any], *, finished: bool = False, folder: Path | None = None
    ) -> None:
        """Write the checkpoint of `step`; all processes must ask.

        Args:
            step: that was just made.
            must_agree: what a run must share with this one to continue it, for state.json.
            finished: whether the stage ends here, with `finish` done.
            folder: of checkpoints; None for the stage's own.

        Raises:
            UserError: it cannot be written; earlier checkpoints are as they were.
        """
        if folder is None:  # only to the stage's own can it return
            self.guard.saving(step)
        names = [name for name, _ in self.network.named_parameters()]
        buffers = dict(self.network.named_buffers())
        files = {"model": self._whole(self.network.state_dict())}
        for name, file in self._average_files().items():
            files[file] = self._whole(dict(zip(names, self.averages.tensors[name], strict=True)) | buffers)
        files["optimizer"] = self._whole(checkpoint.optimizer_tensors(self.optimizer))
        scaler = self.accelerator.scaler
        state = {
            **must_agree,
            "finished": finished,
            "seed": self.training.seed,
            "ema_steps": self.averages.steps,
            "guard": self.guard.to_dict(),
            "positions": gather_object([self.position]),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        keep, every = self.training.keep_checkpoints, self.training.keep_every
        on_main(
            self.accelerator,
            lambda: checkpoint.save(
                folder or self.folder, step, files=files, state=state, keep=keep, keep_every=every
            ),
        )

    def load(self, step: int) -> None:
        """Go back to the checkpoint of `step`.

        Raises:
            UserError: it is damaged or holds tensors of another size.
        """
        folder = self.path(step)
        saved = checkpoint.load_state(folder)
        self._put(folder, "model", self.network.state_dict())
        names = [name for name, _ in self.network.named_parameters()]
        for name, file in self._average_files().items():
            self._put(folder, file, dict(zip(names, self.averages.tensors[name], strict=True)))
        checkpoint.load_optimizer(folder, self.optimizer)
        self.averages.steps = saved["ema_steps"]
        self.guard = Guard(**saved["guard"])
        positions = saved["positions"]
        self.position = positions[self.accelerator.process_index % len(positions)]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps."""
        with explained(self.folder):
            for later in self.steps():
                if later > step:
                    remove_folder(self.path(later))

    def _average_files(self) -> dict[str, str]:
        """The name of each average and of its file; the first is the one that is used."""
        first, *others = self.averages.tensors
        return {first: "ema", **{name: f"ema-{name}" for name in others}}

    def _whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in one piece for the main process to write; of shards the others keep nothing."""
        if not self.sharded:
            return tensors
        kept = {}
        for name, tensor in tensors.items():
            gathered = whole(tensor.detach())
            if self.accelerator.is_main_process:
                kept[name] = gathered.cpu()
        return kept

    @torch.no_grad()
    def _put(self, folder: Path, file: str, targets: dict[str, Tensor]) -> None:
        """Copy the tensors of a file into those of the same names, whole or sharded."""
        loaded = checkpoint.load_tensors(folder, f"{file}.safetensors")
        for name, target in targets.items():
            if name not in loaded or loaded[name].shape != target.shape:
                raise UserError(f"{folder} does not fit the config: {name} is missing or of another size")
            local(target).copy_(local(cut_like(loaded[name], target)))
