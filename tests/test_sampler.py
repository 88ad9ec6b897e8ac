"""The reverse process where its distribution is known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qsm_lightning.networks import Denoiser
from qsm_lightning.sampler import Sampler, reverse_process
from qsm_lightning.schedule import BETAS, NoiseSchedule

N = 200_000
MEAN, VARIANCE = 0.3, 0.04


class GaussianNoise(nn.Module):
    """The exact eps for data N(m, v): eps(a_t) = sqrt(1 - abar) (a_t - sqrt(abar) m) / (abar v + 1 - abar)."""

    action_dim = 1

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule

    def slope_and_centre(self, t: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.schedule.alpha_hats[t]
        return (1 - abar).sqrt() / (abar * VARIANCE + 1 - abar), abar.sqrt() * MEAN

    def forward(self, observation: Tensor, action: Tensor, t: Tensor) -> Tensor:
        slope, centre = self.slope_and_centre(t)
        return slope * (action - centre)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("name", BETAS)
def test_gaussian_score_gives_known_mean_and_variance(name: str, temperature: float) -> None:
    """Every step is linear in a_t, so mean and variance follow by recursion."""
    torch.manual_seed(0)
    schedule = NoiseSchedule(name, 10)  # type: ignore[arg-type]
    denoiser = GaussianNoise(schedule)
    mean, variance = 0.0, 1.0
    for t in reversed(range(schedule.T)):
        slope, centre = (x.item() for x in denoiser.slope_and_centre(torch.tensor(t)))
        beta, alpha = schedule.betas[t].item(), schedule.alphas[t].item()
        coefficient = beta / (1 - schedule.alpha_hats[t].item()) ** 0.5
        gain = (1 - coefficient * slope) / alpha**0.5
        mean = gain * mean + coefficient * slope * centre / alpha**0.5
        variance = gain**2 * variance + (beta * temperature**2 if t > 0 else 0)
    x_T, z = torch.randn(N, 1), torch.randn(schedule.T, N, 1)
    samples = reverse_process(denoiser, schedule, x_T, x_T, z, temperature, clip=False)[-1]  # type: ignore[arg-type]
    assert samples.mean().item() == pytest.approx(mean, abs=5 * (variance / N) ** 0.5 + 1e-5)
    assert samples.var().item() == pytest.approx(variance, rel=0.02)


def test_many_steps_recover_the_gaussian() -> None:
    torch.manual_seed(0)
    schedule = NoiseSchedule("vp", 200)
    noise = torch.randn(201, 20_000, 1)
    denoiser = GaussianNoise(schedule)
    samples = reverse_process(denoiser, schedule, noise[0], noise[0], noise[1:], clip=False)[-1]  # type: ignore[arg-type]
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert samples.var().item() == pytest.approx(VARIANCE, rel=0.1)


def test_every_step_is_clipped_and_the_last_adds_no_noise() -> None:
    torch.manual_seed(0)
    schedule, denoiser = NoiseSchedule("vp", 5), Denoiser(3, 2, (8,))
    observation, x_T, z = torch.randn(64, 3), 10 * torch.randn(64, 2), torch.randn(5, 64, 2)
    trajectory = reverse_process(denoiser, schedule, observation, x_T, z)
    assert len(trajectory) == 5
    assert all(a.abs().max() <= 1 for a in trajectory)
    assert any((a.abs() == 1).any() for a in trajectory)
    z[0] += 100
    torch.testing.assert_close(reverse_process(denoiser, schedule, observation, x_T, z)[-1], trajectory[-1])
    assert x_T.abs().max() > 1, "the starting noise was changed in place"


def test_without_step_clipping_only_the_end_is_clipped() -> None:
    torch.manual_seed(0)
    schedule, denoiser = NoiseSchedule("vp", 5), Denoiser(3, 2, (8,))
    observation, x_T, z = torch.randn(64, 3), torch.randn(64, 2), torch.randn(5, 64, 2)
    trajectory = reverse_process(denoiser, schedule, observation, x_T, z, clip=False)
    assert max(a.abs().max() for a in trajectory) > 1
    assert Sampler(denoiser, schedule, clip=False)(observation).abs().max() <= 1
