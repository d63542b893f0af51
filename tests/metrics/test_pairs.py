from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch

from lediflow.errors import UserError
from lediflow.metrics.pairs import Lpips, psnr, ssim


def _images(n: int = 2, c: int = 3, side: int = 16, seed: int = 0):
    return torch.rand(n, c, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_by_hand():
    a = torch.zeros(2, 1, 4, 4)
    b = torch.stack([torch.full((1, 4, 4), 0.2), torch.full((1, 4, 4), -0.02)])
    assert psnr(a, b).tolist() == pytest.approx([20, 40])
    assert psnr(a, a).tolist() == [math.inf, math.inf]


def test_ssim_of_flat_images_by_hand():
    # no contrast: what is left is the brightness term (2ab + c1) / (a² + b² + c1)
    a, b = torch.full((1, 3, 12, 12), 0.5), torch.full((1, 3, 12, 12), 0.1)
    c1 = 0.02**2
    assert ssim(a, b).item() == pytest.approx((2 * 0.05 + c1) / (0.25 + 0.01 + c1), rel=1e-6)


def test_ssim_of_one_window_is_the_formula():
    a, b = _images(1, 1, 11, 0).double(), _images(1, 1, 11, 1).double()
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / 4.5)
    w = line.outer(line) / line.sum() ** 2
    ma, mb = (w * a[0, 0]).sum(), (w * b[0, 0]).sum()
    va, vb = (w * (a[0, 0] - ma) ** 2).sum(), (w * (b[0, 0] - mb) ** 2).sum()
    cov = (w * (a[0, 0] - ma) * (b[0, 0] - mb)).sum()
    c1, c2 = 0.02**2, 0.06**2
    expected = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    assert ssim(a, b).item() == pytest.approx(expected.item(), rel=1e-9)


def test_ssim_is_one_for_equal_images_symmetric_and_falls_with_noise():
    a = _images()
    assert ssim(a, a).tolist() == pytest.approx([1, 1])
    little, much = a + 0.05 * _images(seed=1), a + 0.5 * _images(seed=1)
    assert ssim(a, little).tolist() == pytest.approx(ssim(little, a).tolist())
    assert (ssim(a, much) < ssim(a, little)).all()


def test_lpips_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match="pip install lpips"):
        Lpips()


def test_lpips_gets_rgb_in_its_range(monkeypatch):
    seen = []

    class Network(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, a, b):
            seen.append((a, b))
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    package = ModuleType("lpips")
    package.LPIPS = Network
    monkeypatch.setitem(sys.modules, "lpips", package)
    grey = _images(2, 1)
    assert Lpips()(grey, -grey).tolist() == pytest.approx((2 * grey).abs().mean((1, 2, 3)).tolist())
    assert seen[0][0].shape == (2, 3, 16, 16)


def test_mistakes():
    with pytest.raises(UserError, match="one shape"):
        psnr(_images(), _images(side=8))
    with pytest.raises(UserError, match="at least 11 pixels"):
        ssim(_images(side=8), _images(side=8))
