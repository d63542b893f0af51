"""The start of the coupling flow: the paper's schedule, and the sizes."""

import torch

from lediflow.upsampling import enlarged, noised, signal_share


def test_the_schedule_is_the_papers_at_every_level():
    s = torch.linspace(0, 1, 1000, dtype=torch.float64)[:-1]
    expected = torch.sigmoid(-2 * torch.log(torch.tan(torch.pi * s / 2) + 1e-5))
    share = signal_share(torch.arange(1000))
    torch.testing.assert_close(share[:-1].double(), expected, rtol=1e-4, atol=1e-6)
    assert share[-1] < 1e-10, "nothing of the sample is left at the last level"
    torch.testing.assert_close(share[[200, 400]].sqrt(), torch.tensor([0.951, 0.809]), rtol=1e-3, atol=0)


def test_the_start_keeps_the_variance_of_a_unit_sample():
    generator = torch.Generator().manual_seed(0)
    sample, noise = (
        torch.randn(2, 3, 64, 64, generator=generator),
        torch.randn(2, 3, 64, 64, generator=generator),
    )
    x = noised(sample, torch.tensor([0, 400]), noise)
    torch.testing.assert_close(x[0], sample[0], rtol=0, atol=1e-4)
    assert abs(x[1].std() - 1) < 0.05
    expected = 0.8086 * sample[1] + 0.5883 * noise[1]
    torch.testing.assert_close(x[1], expected, rtol=1e-3, atol=1e-3)


def test_nearest_repeats_and_bilinear_keeps_a_ramp():
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    assert torch.equal(enlarged(ramp, (8, 8)), ramp.repeat_interleave(2, 2).repeat_interleave(2, 3))
    middle = enlarged(ramp, (8, 8), "bilinear")[0, 0, 0, 1:-1]
    torch.testing.assert_close(middle.diff(), torch.full((5,), 0.5))
