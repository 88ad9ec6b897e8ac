"""Noise schedules against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from qsm_lightning.errors import SettingError
from qsm_lightning.schedule import BETAS, NoiseSchedule


@pytest.mark.parametrize("T", [1, 2, 5, 10, 100])
def test_vp_ends_at_the_same_alpha_hat_for_every_length(T: int) -> None:
    """The integral of the rate is (b_min + b_max) / 2 whatever T is."""
    assert NoiseSchedule("vp", T).alpha_hats[-1].item() == pytest.approx(math.exp(-5.05), rel=1e-5)


@pytest.mark.parametrize(("T", "expected"), [(5, 0.951), (10, 0.904), (20, 0.817), (100, 0.364)])
def test_linear_leaves_most_of_the_action_when_short(T: int, expected: float) -> None:
    product = math.prod(1 - (1e-4 + (2e-2 - 1e-4) * t / (T - 1)) for t in range(T))
    terminal = NoiseSchedule("linear", T).alpha_hats[-1].item()
    assert terminal == pytest.approx(product, rel=1e-5)
    assert terminal == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("T", [2, 5, 10, 100])
def test_cosine_follows_its_curve_until_the_clipped_last_step(T: int) -> None:
    """alpha_hat(u) = f(u) / f(0) while no beta is clipped; the last beta is 0.999, as f(1) = 0."""

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha_hats = NoiseSchedule("cosine", T).alpha_hats
    for t in range(T - 1):
        assert alpha_hats[t].item() == pytest.approx(f((t + 1) / T) / f(0), rel=1e-4)
    assert alpha_hats[-1].item() == pytest.approx(0.001 * (f((T - 1) / T) / f(0)), rel=1e-3)


@pytest.mark.parametrize("name", BETAS)
def test_coefficients_agree_with_each_other(name: str) -> None:
    s = NoiseSchedule(name, 7)  # type: ignore[arg-type]
    assert s.T == 7
    torch.testing.assert_close(s.alphas, 1 - s.betas)
    torch.testing.assert_close(s.alpha_hats, s.alphas.cumprod(0))
    torch.testing.assert_close(s.sqrt_alpha_hats**2 + s.sqrt_one_minus_alpha_hats**2, torch.ones(7))
    torch.testing.assert_close(s.eps_coefs * s.sqrt_one_minus_alpha_hats, s.betas)
    torch.testing.assert_close(torch.tensor(s.sigmas) ** 2, s.betas)


def test_forward_process_has_the_moments_of_its_definition() -> None:
    torch.manual_seed(0)
    s, action, t = NoiseSchedule("vp", 5), torch.full((200_000, 1), 0.7), torch.full((200_000,), 2)
    noisy = s.add_noise(action, t, torch.randn_like(action))
    assert noisy.mean().item() == pytest.approx(0.7 * s.sqrt_alpha_hats[2].item(), abs=0.01)
    assert noisy.var().item() == pytest.approx(1 - s.alpha_hats[2].item(), abs=0.01)


@pytest.mark.parametrize("T", [0, -3])
def test_no_steps_is_refused(T: int) -> None:
    with pytest.raises(SettingError, match="T is"):
        NoiseSchedule("vp", T)


@pytest.mark.parametrize("name", BETAS)
def test_another_precision_is_rounded_from_float64_alone(name: str) -> None:
    """So a number and an index for t give the same step, and the forward process is the reverse one's."""
    s = NoiseSchedule(name, 7).double()  # type: ignore[arg-type]
    exact = BETAS[name](7)
    assert torch.equal(s.betas, exact)
    assert torch.equal(s.alpha_hats, (1 - exact).cumprod(0))
    noisy, eps = torch.randn(7, 2).double(), torch.randn(7, 2).double()
    together = s.reverse_mean(noisy, torch.arange(7), eps)
    assert torch.equal(together, torch.stack([s.reverse_mean(noisy[t], t, eps[t]) for t in range(7)]))
    assert torch.equal(s.float().betas, exact.float())
