"""How like its original a reconstruction is: PSNR, SSIM and LPIPS, one number per image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lediflow.errors import UserError

_RANGE = 2.0  # images lie in [-1, 1]
_WINDOW, _WINDOW_SIGMA = 11, 1.5


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, (N,), of images (N, C, H, W) in [-1, 1].

    Higher is better; infinite for equal images.

    Raises:
        UserError: the shapes differ.
    """
    a, b = _paired(a, b)
    return 20 * math.log10(_RANGE) - 10 * (a - b).square().mean((1, 2, 3)).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity, (N,), of images (N, C, H, W) in [-1, 1]; 1 for equal images.

    Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004): Gaussian
    window of 11 pixels and sigma 1.5, K1 0.01, K2 0.03, no padding, the mean over places and channels.

    Raises:
        UserError: the shapes differ, or a side is shorter than the window.
    """
    a, b = _paired(a, b)
    if min(a.shape[2:]) < _WINDOW:
        raise UserError(f"SSIM needs images of at least {_WINDOW} pixels a side, not {tuple(a.shape[2:])}")
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * _WINDOW_SIGMA**2))
    line = (line / line.sum()).to(a.device)

    def blur(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(flat, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1)).view(
            *x.shape[:2], x.shape[2] - _WINDOW + 1, x.shape[3] - _WINDOW + 1
        )

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similarity.mean((1, 2, 3))


class Lpips:
    """LPIPS with AlexNet, of Zhang et al., "The unreasonable effectiveness of deep features" (2018).

    Args:
        device: where the network runs.

    Raises:
        UserError: the package lpips, or the torchvision that it needs, does not import.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        try:
            import lpips
        except (ImportError, RuntimeError) as error:  # torchvision of another torch raises RuntimeError
            raise UserError(
                f"LPIPS needs the packages lpips and torchvision, and they do not import here ({error}); "
                "pip install lpips, with the torchvision that belongs to your torch, or leave LPIPS out"
            ) from None
        self._device = torch.device(device)
        self._network = lpips.LPIPS(net="alex", verbose=False).to(self._device).eval()

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance, (N,), of images (N, C, H, W) in [-1, 1], C 1 or 3; lower is better.

        Raises:
            UserError: the shapes differ.
        """
        a, b = (x.float().expand(-1, 3, -1, -1).to(self._device) for x in _paired(a, b))
        return self._network(a, b).flatten().double().cpu()


def _paired(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 4 or a.shape != b.shape:
        raise UserError(
            f"two sets of images (N, C, H, W) of one shape are compared, not {tuple(a.shape)} "
            f"and {tuple(b.shape)}"
        )
    return a.detach().double(), b.detach().double()
