"""The inverse temperature where the best action and the curvature are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsm_lightning.errors import SettingError
from qsm_lightning.losses import QSM
from qsm_lightning.losses.qsm import CURVATURE_SAMPLES
from qsm_lightning.sampler import reverse_process
from qsm_lightning.schedule import NoiseSchedule
from tests.compare import state
from tests.helpers import SHRINK, replay_batch
from tests.processes import trained

OBS, A = 3, 2


class Bowl(nn.Module):
    """Both critics are -H |a - best|^2 / 2, whose slope is H (best - a)."""

    def __init__(self, curvature: float, best: float = 0.0) -> None:
        super().__init__()
        self.curvature, self.best = nn.Parameter(torch.tensor(curvature)), best

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return (-self.curvature * (action - self.best).square().sum(-1) / 2).expand(2, -1)


class Slope(nn.Module):
    """Both critics are c (a_1 + a_2): the best action is in a corner."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return (self.c * action.sum(-1)).expand(2, -1)


def made(critics: nn.Module, T: int = 5, **settings: Any) -> QSM:
    torch.manual_seed(0)
    loss = QSM(OBS, A, hidden=(8,), time_dim=8, T=T, m_q="auto", m_q_lr=0.02, **settings)
    loss.critics = critics
    return loss


def settled(loss: QSM, steps: int = 1500) -> float:
    """M_q after so many steps of its optimizer, averaged over the last of them."""
    optimizer = torch.optim.Adam([loss.log_m_q], loss.learning_rates["m_q"])
    found = []
    for i in range(steps):
        optimizer.zero_grad()
        loss.m_q_loss(replay_batch(256, OBS, A, seed=i))[0].backward()
        optimizer.step()
        found.append(loss.log_m_q.item())
    return torch.tensor(found[-500:]).mean().exp().item()


@pytest.mark.parametrize("T", [5, 10, 20])
@pytest.mark.parametrize("curvature", [0.02, 1.0, 50.0])
def test_it_finds_the_slope_of_the_best_noise_predictor(curvature: float, T: int) -> None:
    """M_q H = 1 / sqrt(1 - abar_0): with all mass at 0, E[z | a_0] is a_0 over that. It scales as 1 / H exactly."""
    loss = made(Bowl(curvature), T, m_q_slope=0.0)
    expected = 1 / loss.schedule.sqrt_one_minus_alpha_hats[0].item()
    assert settled(loss) * curvature == pytest.approx(expected, rel=0.02)


def test_the_slope_that_is_to_be_left_makes_it_softer_in_every_unit_of_reward() -> None:
    """For small actions, which no bound stops, M_q H = (1 - rho sqrt(alpha_0)) / sqrt(1 - abar_0)."""
    found = []
    for curvature in (0.01, 1.0, 100.0):
        loss = made(Bowl(curvature), m_q_slope=0.4)
        found.append(settled(loss) * curvature)
    torch.testing.assert_close(torch.tensor(found), torch.full((3,), found[0]), rtol=0.01, atol=0)
    alpha = loss.schedule.alphas[0]
    with torch.no_grad():
        loss.log_m_q.copy_(((1 - 0.4 * alpha.sqrt()) / (1 - alpha).sqrt() / 100).log())
    small = 0.1 * torch.randn(1000, A)
    rho = loss.slope_left(torch.zeros(1000, OBS), small, 0.1 * torch.randn(1000, A))
    assert rho.item() == pytest.approx(0.4, abs=1e-4)


@pytest.mark.parametrize("T", [5, 10, 20])
@pytest.mark.parametrize("best", [0.0, 0.4, -0.7])
def test_the_sampler_then_ends_at_the_best_action(best: float, T: int) -> None:
    """Not beside it, and not at the bounds, where a fixed M_q of 50 takes it."""
    loss = made(Bowl(4.0, best), T, m_q_slope=0.0)
    schedule, m_q = loss.schedule, settled(loss)
    torch.manual_seed(1)
    noise = torch.randn(T + 1, 4000, A)

    def sampled(scale: float) -> Tensor:
        class Exact(nn.Module):
            def forward(self, observation: Tensor, action: Tensor, t: Tensor) -> Tensor:
                return -scale * 4.0 * (best - action)

        return reverse_process(Exact(), schedule, torch.zeros(4000, OBS), noise[-1], noise[:-1])[-1]  # type: ignore[arg-type]

    found, fixed = sampled(m_q), sampled(50.0)
    assert (found.mean() - best).abs() < 0.12
    assert found.std() < 0.12
    assert (fixed.abs() > 0.999).float().mean() > 0.9


@pytest.mark.parametrize("c", [0.003, 0.3, 30.0])
def test_a_slope_without_a_top_is_climbed_to_the_bounds_and_no_further(c: float) -> None:
    """rho is 1 while no step reaches them, and the share of the climb that they have not stopped when some do."""
    loss = made(Slope(c))
    assert loss.m_q_slope == 0.15
    m_q = settled(loss)
    batch, z = replay_batch(4000, OBS, A), torch.randn(4000, A)
    alpha = loss.schedule.alphas[0]
    start = (alpha.sqrt() * batch["action"] + (1 - alpha).sqrt() * z) / alpha.sqrt()
    end = start + ((1 - alpha) / alpha).sqrt() * m_q * c
    moved = end.clamp(-1, 1) - start.clamp(-1, 1)
    assert (moved * (end <= 1)).sum() / moved.sum() == pytest.approx(0.15, abs=0.05)
    with torch.no_grad():
        loss.log_m_q.fill_(-12.0)
    assert loss.slope_left(batch["observation"], batch["action"], z) == pytest.approx(1.0, abs=0.01)
    with torch.no_grad():
        loss.log_m_q.fill_(20.0)
    assert loss.slope_left(batch["observation"], batch["action"], z) == 0


def test_without_any_slope_nothing_moves() -> None:
    loss, batch = made(Slope(0.0)), replay_batch(256, OBS, A)
    value, metrics = loss.m_q_loss(batch)
    assert metrics["slope_left"] == 0
    assert value.isfinite()


def test_the_share_of_the_slope_that_is_left_by_hand() -> None:
    loss = made(Bowl(2.0, 0.3))
    with torch.no_grad():
        loss.log_m_q.fill_(0.5)
    schedule = NoiseSchedule("vp", 5)
    batch, z = replay_batch(32, OBS, A), torch.randn(32, A)
    alpha = schedule.alphas[0]  # abar_0 is alpha_0
    noisy = alpha.sqrt() * batch["action"] + (1 - alpha).sqrt() * z
    m_q = torch.tensor(0.5).exp()
    far = (noisy - schedule.betas[0] / (1 - alpha).sqrt() * (-m_q * 2 * (0.3 - noisy))) / alpha.sqrt()
    end = far.clamp(-1, 1)
    moved = end - (noisy / alpha.sqrt()).clamp(-1, 1)
    assert 0 < (far.abs() > 1).sum() < far.numel(), "bounds stop some"
    expected = (2 * (0.3 - end) * moved)[far.abs() <= 1].sum() / (2 * (0.3 - noisy) * moved).sum()
    torch.testing.assert_close(loss.slope_left(batch["observation"], batch["action"], z), expected)


def test_it_is_what_the_denoiser_is_scaled_by_and_only_its_term_moves_it() -> None:
    torch.manual_seed(0)
    loss, batch = QSM(OBS, A, hidden=(8,), time_dim=8, m_q="auto"), replay_batch(256)
    assert loss.terms == ("qvalue", "actor", "m_q")
    with torch.no_grad():
        loss.log_m_q.fill_(1.5)
    t, noise = torch.randint(5, (256,)), torch.randn(256, A)
    value, eps, g = loss.score_matching(batch["observation"], batch["action"], t, noise)
    torch.testing.assert_close(value, (eps + torch.tensor(1.5).exp() * g).square().mean())
    for term in loss.terms:
        for p in loss.parameters():
            p.grad = None
        loss.term_loss(term, batch)[0].backward()
        assert (loss.log_m_q.grad is not None) == (term == "m_q")
    assert all(p.grad is None for name, p in loss.named_parameters() if name != "log_m_q")
    assert CURVATURE_SAMPLES < 256


def test_a_batch_gives_the_target_its_size() -> None:
    """-sigma_t g / (0.1 mean |g|), so that rewards in other units change nothing."""
    torch.manual_seed(0)
    loss, batch = QSM(OBS, A, hidden=(8,), time_dim=8, m_q="batch", batch_temperature=0.2), replay_batch(64)
    t, noise = torch.randint(5, (64,)), torch.randn(64, A)
    value, eps, g = loss.score_matching(batch["observation"], batch["action"], t, noise)
    sigma = (1 - loss.schedule.alpha_hats[t, None]).sqrt()
    torch.testing.assert_close(value, (eps + sigma * g / (0.2 * g.abs().mean())).square().mean())
    for critic in loss.critics.critics:  # type: ignore[union-attr]
        critic.layers[-1].weight.data *= 100
    torch.testing.assert_close(loss.score_matching(batch["observation"], batch["action"], t, noise)[0], value)


def test_a_run_adapts_and_keeps_it(tmp_path: Path) -> None:
    run = trained(tmp_path, "--config=pendulum", *SHRINK, "--model.loss.m_q=auto")
    content = state(run)
    assert content["state_dict"]["loss.log_m_q"] != 0
    assert len(content["optimizer_states"]) == 3
    assert content["optimizer_states"][2]["param_groups"][0]["lr"] == 3e-3


@pytest.mark.parametrize(
    "setting", [{"m_q": "often"}, {"m_q": -1}, {"batch_temperature": 0}, {"m_q_lr": 0}, {"m_q_slope": 1}], ids=str
)
def test_values_out_of_range_are_refused_by_name(setting: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(setting))):
        QSM(OBS, A, **setting)
