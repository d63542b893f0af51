"""Drifting (arXiv 2602.04770) in the features of a small masked autoencoder; `ideas.py` tries it."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lediflow.networks.hourglass import patchify


def drifting_loss(made: Tensor, real: Tensor, temperatures: tuple[float, ...] = (0.02, 0.05, 0.2)) -> Tensor:
    """Mean of (f - sg(f + V))^2: V draws each feature to real ones and away from others that were made.

    Args:
        made: features of generated images, (B, D).
        real: of real ones, (N, D).
        temperatures: of the kernel, in mean distances of the features.
    """
    with torch.no_grad():
        scale = torch.cdist(made, real).mean()
        f, g = made / scale, real / scale
        away = torch.cdist(f, f) + 1e6 * torch.eye(len(f))
        distances = torch.cat((torch.cdist(f, g), away), dim=1)
        drift = torch.zeros_like(f)
        for temperature in temperatures:
            logits = -distances / temperature
            weights = (logits.softmax(1) * logits.softmax(0)).sqrt()
            to, fro = weights.split((len(g), len(f)), dim=1)
            v = (to * fro.sum(1, keepdim=True)) @ g - (fro * to.sum(1, keepdim=True)) @ f
            drift += v / v.square().sum(1).mean().sqrt().clamp_min(1e-8)
        target = f + drift / len(temperatures)
    return (made / scale - target).square().sum(1).mean()


def masked_autoencoder(images: Tensor, *, patch: int, width: int = 128, steps: int = 800) -> Callable:
    """Train a small masked autoencoder (arXiv 2111.06377); return images -> features, each (B, D)."""
    torch.manual_seed(0)
    tokens = patchify(images.movedim(1, -1), patch).flatten(1, 2)  # (N, T, patch^2 C)
    count, size = tokens.shape[1:]

    def blocks(depth: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
        )
        return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    parts = nn.ModuleDict(
        {
            "in": nn.Linear(size, width),
            "encoder": blocks(3),
            "decoder": blocks(1),
            "out": nn.Linear(width, size),
        }
    )
    parts.register_parameter("place", nn.Parameter(0.02 * torch.randn(count, width)))
    parts.register_parameter("mask", nn.Parameter(0.02 * torch.randn(width)))
    optimizer = torch.optim.AdamW(parts.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    kept = count // 4
    for _ in range(steps):
        y = tokens[torch.randint(len(tokens), (128,))]
        order = torch.rand(len(y), count).argsort(1)
        seen = order[:, :kept, None].expand(-1, -1, width)
        code = parts["encoder"]((parts["in"](y) + parts.place).gather(1, seen))
        full = parts.mask.expand(len(y), count, -1).scatter(1, seen, code) + parts.place
        errors = (parts["out"](parts["decoder"](full)) - y).square()
        loss = errors.gather(1, order[:, kept:, None].expand(-1, -1, size)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    print(f"masked autoencoder: {loss.item():.3f} of {tokens.var().item():.3f}", file=sys.stderr)
    parts.requires_grad_(False)

    def features(y: Tensor) -> list[Tensor]:
        x = parts["in"](patchify(y.movedim(1, -1), patch).flatten(1, 2)) + parts.place
        found = []
        for layer in parts["encoder"].layers:
            x = layer(x)
            found += [x.mean(1), x.std(1)]
        side = int(count**0.5)
        grid = x.unflatten(1, (side, side)).movedim(-1, 1)
        return [*found, *F.adaptive_avg_pool2d(grid, 4).flatten(2).unbind(2)]

    return features
