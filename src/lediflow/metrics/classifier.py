"""A small classifier trained on the user's own pictures, whose features distances are taken in.

It needs no download, is trained in seconds, and separates what matters in that data; its numbers compare
models of one dataset, and with nothing published (docs/evaluation.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lediflow.errors import UserError
from lediflow.pictures import to_float

FEATURES = 64
_SMALLEST = 8
_BATCH = 512

# indices, int64 (n,) -> those images, (n, C, H, W), uint8 or float in [-1, 1]
Read = Callable[[Tensor], Tensor]


class SmallClassifier(nn.Module):
    """Four 3x3 convolutions (two of them halve the image), global average pool, 64 features, linear.

    About 93,000 parameters. Takes images (B, C, H, W), float in [-1, 1], with H and W at least 8; others
    raise UserError.

    Args:
        channels: 1 (grey) or 3 (RGB); anything else raises UserError.
        num_classes: number of classes, at least 2; fewer raise UserError.
    """

    feature_scale: Tensor

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise UserError(f"the classifier takes images with 1 or 3 channels, not {channels}")
        if num_classes < 2:
            raise UserError(
                f"a classifier needs at least 2 classes and this data has {num_classes}; "
                "measure it with features that need no labels"
            )
        self.channels = channels
        # No normalisation layers: they divide each image by its own contrast, and washed-out samples, a
        # common fault of generators, would then lie closer to the real ones than they look.
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, FEATURES, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(FEATURES, FEATURES, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(FEATURES, FEATURES, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ).to(memory_format=torch.channels_last)  # a fifth to a third less time per training step on a CPU
        self.head = nn.Linear(FEATURES, num_classes)
        self.register_buffer("feature_scale", torch.ones(()))  # set by train_classifier

    def features(self, images: Tensor) -> Tensor:
        """Return the scaled activations before the last linear layer, (B, 64), about -1 to 10.

        Over the training set their total variance is 64, so that distances of two trainings are on the same
        footing.
        """
        return self._pooled(images) / self.feature_scale

    def forward(self, images: Tensor) -> Tensor:
        """Return the class logits (B, num_classes)."""
        return self.head(self._pooled(images))

    def _pooled(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.channels or min(images.shape[2:]) < _SMALLEST:
            raise UserError(
                f"this classifier takes images (B, {self.channels}, H, W) with H and W at least {_SMALLEST}, "
                f"not {tuple(images.shape)}"
            )
        return self.body(images.contiguous(memory_format=torch.channels_last))


def train_classifier(
    read: Read,
    labels: Tensor,
    *,
    num_classes: int,
    seed: int,
    steps: int = 400,
    batch_size: int = 64,
    progress: Callable[[int, float], None] | None = None,
) -> SmallClassifier:
    """Train a :class:`SmallClassifier` on the CPU, on batches read when they are needed; return it frozen.

    AdamW under a one-cycle schedule, label smoothing 0.1, each image shifted by up to 1 pixel for every 16 of
    its shorter side (at least 1). The same seed on the same machine gives the same weights; the global random
    state is left alone.

    Args:
        read: gives the images of indices below N; C is 1 or 3, H and W at least 8.
        labels: (N,), integers in [0, num_classes).
        num_classes: number of classes, at least 2.
        seed: decides the initial weights, the order of the images and their shifts.
        steps: optimiser steps, at least 1.
        batch_size: images per step; the whole set where it is smaller.
        progress: called after each step with (steps done, loss).

    Returns:
        The classifier in evaluation mode, its parameters frozen, ``feature_scale`` set.

    Raises:
        UserError: fewer than 2 classes, also among the labels; a label out of range; impossible counts; or
            images that do not suit the network.
    """
    _check(labels, num_classes, steps, batch_size)
    labels = labels.long()
    channels = read(torch.zeros(1, dtype=torch.long)).shape[1]
    # the default generator's own manual_seed, for torch.manual_seed would also reseed every GPU
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = SmallClassifier(channels, num_classes)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=5e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(labels))
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(labels), generator=generator)])
        index, order = order[:batch_size], order[batch_size:]
        logits = model(_shifted(_as_float(read(index)), generator))
        loss = F.cross_entropy(logits, labels[index], label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, loss.item())
    model.eval().requires_grad_(False)
    # a layer's raw scale is an accident of training, and the Fréchet distance grows with its square
    features = _in_batches(model.features, read, len(labels)).double()
    model.feature_scale.copy_(features.var(dim=0).mean().sqrt())
    return model


def accuracy(model: SmallClassifier, read: Read, labels: Tensor) -> float:
    """Return the share of images, in [0, 1], whose largest logit is their label's.

    Args:
        model: the classifier; the work is done on its device.
        read: gives the images of indices below N.
        labels: (N,), integers, N at least 1.
    """
    guesses = _in_batches(
        lambda batch: model(batch).argmax(dim=1), read, len(labels), model.head.weight.device
    )
    return (guesses == labels.cpu()).double().mean().item()


def _in_batches(
    function: Callable[[Tensor], Tensor], read: Read, count: int, device: torch.device | None = None
) -> Tensor:
    with torch.no_grad():
        batches = torch.arange(count).split(_BATCH)
        return torch.cat([function(_as_float(read(batch)).to(device)).cpu() for batch in batches])


def _as_float(images: Tensor) -> Tensor:
    return to_float(images) if images.dtype == torch.uint8 else images.float()


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image of (B, C, H, W) by its own few pixels, the border repeated."""
    count, _, height, width = images.shape
    reach = max(1, min(height, width) // 16)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    which = torch.arange(count)
    # advanced indices on both sides of the channel slice put the channels last, (B, H, W, C)
    return padded[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _check(labels: Tensor, num_classes: int, steps: int, batch_size: int) -> None:
    if steps < 1 or batch_size < 1:
        raise UserError(f"steps and batch_size must be at least 1, not {steps} and {batch_size}")
    classes = labels.unique()
    if len(classes) < 2 or num_classes < 2:
        raise UserError("the labels hold fewer than 2 classes, so there is nothing for a classifier to learn")
    if classes[0] < 0 or classes[-1] >= num_classes:
        raise UserError(
            f"labels must lie in 0..{num_classes - 1}, "
            f"and these go from {int(classes[0])} to {int(classes[-1])}"
        )
