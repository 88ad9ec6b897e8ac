"""The inverse temperature where the best action and the curvature are known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from qsm_lightning.errors import SettingError
from qsm_lightning.losses import QSM
from qsm_lightning.losses.qsm import EVERY
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
    loss = QSM(OBS, A, hidden=(8,), time_dim=8, T=T, m_q="auto", **({"m_q_lr": 0.02} | settings))
    loss.critics = critics
    return loss


def adapted(loss: QSM, steps: int) -> Iterator[float]:
    """M_q at each of so many steps of its optimizer."""
    optimizer = torch.optim.Adam([loss.log_size], loss.learning_rates["m_q"])
    torch.manual_seed(0)
    for i in range(steps):
        optimizer.zero_grad()
        batch = replay_batch(256, OBS, A, seed=i)
        m_q = loss.actor_loss(batch)[1]["m_q"].item()
        loss.m_q_loss(batch)[0].backward()
        optimizer.step()
        yield m_q


def settled(loss: QSM, steps: int = 700) -> float:
    """M_q after so many steps, averaged over the last of them."""
    return torch.tensor([*adapted(loss, steps)][-350:]).log().mean().exp().item()


@pytest.mark.parametrize("T", [5, 10, 20])
@pytest.mark.parametrize("curvature", [0.02, 1.0, 50.0])
def test_it_finds_the_slope_of_the_best_noise_predictor(curvature: float, T: int) -> None:
    """M_q H = 1 / sqrt(1 - abar_0): with all mass at 0, E[z | a_0] is a_0 over that. It scales as 1 / H exactly."""
    loss = made(Bowl(curvature), T, m_q_slope=0.0)
    expected = 1 / loss.schedule.sqrt_one_minus_alpha_hats[0].item()
    assert settled(loss) * curvature == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("unit", [2.0**-10, 3.0, 2.0**10])
@pytest.mark.parametrize("critics", [Bowl(1.0, 0.3), Bowl(8.0), Slope(0.5)], ids=["bowl", "steep", "slope"])
@pytest.mark.parametrize("score_at", ["noisy", "denoised"])
def test_in_another_unit_of_reward_every_step_is_the_same(score_at: str, critics: nn.Module, unit: float) -> None:
    """With the shipped rate, from the first on: Q times k has M_q / k, to the bit for powers of two, and one target."""
    scaled = deepcopy(critics)
    for p in scaled.parameters():
        p.data *= unit
    loss, other = (made(critics, m_q_lr=3e-3, score_at=score_at) for critics in (critics, scaled))
    expected, found = [m_q / unit for m_q in adapted(loss, 300)], [*adapted(other, 300)]
    assert found == pytest.approx(expected, rel=1e-3 if unit == 3 else 0)
    batch, t, noise = replay_batch(256, OBS, A), torch.randint(5, (256,)), torch.randn(256, A)
    values = [one.score_matching(batch["observation"], batch["action"], t, noise)[0] for one in (loss, other)]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-3 if unit == 3 else 0)


def test_the_slope_that_is_left_where_no_bound_stops() -> None:
    """For small actions, rho is left by M_q H = (1 - rho sqrt(alpha_0)) / sqrt(1 - abar_0)."""
    loss = made(Bowl(100.0))
    alpha = loss.schedule.alphas[0]
    m_q = (1 - 0.4 * alpha.sqrt()) / (1 - alpha).sqrt() / 100
    small = 0.1 * torch.randn(1000, A)
    rho = loss.slope_left(torch.zeros(1000, OBS), small, 0.1 * torch.randn(1000, A), m_q)
    assert rho.item() == pytest.approx(0.4, abs=1e-4)


class Implicit(nn.Module):
    """eps = -k (best - v), v being where the step that it makes ends: converged in a bowl, with slopes there."""

    action_dim = A

    def __init__(self, k: float, best: float, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.k, self.best, self.schedule = k, best, schedule

    def forward(self, observation: Tensor, action: Tensor, t: Tensor) -> Tensor:
        coef, scale = self.schedule.eps_coefs[t, None], self.schedule.inv_sqrt_alphas[t, None]
        v = scale * (action + coef * self.k * self.best) / (1 + scale * coef * self.k)  # scale (action - coef eps)
        return -self.k * (self.best - v.clamp(-1, 1))


class Linear(nn.Module):
    """eps = -k (best - a), what a denoiser converges to in a bowl with k = M_q H."""

    def __init__(self, k: float, best: float) -> None:
        super().__init__()
        self.k, self.best = k, best

    def forward(self, observation: Tensor, action: Tensor, t: Tensor) -> Tensor:
        return -self.k * (self.best - action)


def bowl_policy(schedule: NoiseSchedule, slopes: list[float], best: float = 0.0) -> tuple[float, float]:
    """Mean and deviation of a sample without bounds, for eps = -slopes_t (best - a_t): every step is linear."""
    mean, variance = 0.0, 1.0
    for t in reversed(range(schedule.T)):
        alpha, beta, left = schedule.alphas[t].item(), schedule.betas[t].item(), 1 - schedule.alpha_hats[t].item()
        c = beta / left**0.5 * slopes[t]
        mean = ((1 - c) * mean + c * best) / alpha**0.5
        variance = (1 - c) ** 2 * variance / alpha + (beta if t > 0 else 0.0)
    return mean, variance**0.5


@pytest.mark.parametrize("T", [5, 10, 20])
@pytest.mark.parametrize("best", [0.0, 0.3])
@pytest.mark.parametrize("slope", [0.0, 0.15])
def test_on_a_bandit_samples_lie_around_the_best_action_with_half_the_deviation_of_the_closed_form(
    slope: float, best: float, T: int
) -> None:
    """Around the best action, which a fixed M_q of 50 leaves for the bounds.

    exp(Q / tau) has the variance v = tau / H; the noise predictor of that policy has at step 0 the slope
    sqrt(1 - alpha_0) / (alpha_0 v + 1 - alpha_0). That is the rule's M_q H for v = (1 - alpha_0) rho / (sqrt(alpha_0)
    (1 - rho sqrt(alpha_0))). Samples have 0.56 to 0.60 of its deviation, and those of that predictor itself 0.56 to
    0.62: the last step adds no noise.
    """
    H = 4.0
    loss = made(Bowl(H, best), T, m_q_slope=slope)
    k = settled(loss) * H
    mean, deviation = bowl_policy(loss.schedule, [k] * T, best)
    v = variance_of_the_closed_form(loss)
    exact = [(1 - a) ** 0.5 / (a * v + 1 - a) for a in loss.schedule.alpha_hats.tolist()]
    assert k == pytest.approx(exact[0], rel=0.03)
    torch.manual_seed(1)
    noise = torch.randn(T + 1, 20_000, A)

    def sampled(k: float, clip: bool) -> Tensor:
        denoiser: Any = Linear(k, best)
        return reverse_process(denoiser, loss.schedule, torch.zeros(20_000, OBS), noise[-1], noise[:-1], clip=clip)[-1]

    free, found, fixed = sampled(k, False), sampled(k, True), sampled(50 * H, True)
    assert free.mean() == pytest.approx(mean, abs=0.005)
    assert free.std() == pytest.approx(deviation, rel=0.02, abs=0.005)
    assert abs(found.mean() - best) < 0.12
    assert 0.4 * v**0.5 < found.std() < 0.7 * v**0.5 if slope > 0 else found.std() < 0.02
    if slope > 0:
        assert 0.555 < bowl_policy(loss.schedule, exact[:1] * T)[1] / v**0.5 < 0.605
        assert 0.555 < bowl_policy(loss.schedule, exact)[1] / v**0.5 < 0.625
    assert (fixed.abs() > 0.999).float().mean() > 0.9


def variance_of_the_closed_form(loss: QSM) -> float:
    """v of exp(Q / tau) in a bowl, tau being what ``m_q: auto`` comes to."""
    alpha, rho = loss.schedule.alphas[0].item(), loss.m_q_slope
    if loss.score_at == "denoised":
        return (1 - alpha) / alpha * rho / (1 - rho)
    return (1 - alpha) * rho / (alpha**0.5 * (1 - rho * alpha**0.5))


@pytest.mark.parametrize("T", [5, 10, 20])
@pytest.mark.parametrize("best", [0.0, 0.3])
@pytest.mark.parametrize("m_q", [0.05, 3.0, 1e4])
def test_with_slopes_at_denoised_actions_a_step_is_the_implicit_one(m_q: float, best: float, T: int) -> None:
    """Which no M_q makes overshoot, and which at step 0 is that of exp(Q / tau), tau = sqrt(1 / alpha_0 - 1) / M_q."""
    H = 4.0
    torch.manual_seed(0)
    loss = QSM(OBS, A, hidden=(8,), time_dim=8, T=T, m_q=m_q, score_at="denoised").double()
    loss.critics = Bowl(H, best).double()
    loss.denoiser = cast(Any, Implicit(m_q * H, best, loss.schedule))
    observation, t = torch.zeros(600, OBS).double(), torch.arange(600) % T
    action, noise = 2 * torch.rand(600, A).double() - 1, torch.randn(600, A).double()
    value, eps, g, _ = loss.score_matching(observation, action, t, noise)
    assert value.item() == pytest.approx(0, abs=1e-9), "the loss is at its least there"
    noisy = loss.schedule.add_noise(action, t, noise)
    alpha, c = loss.schedule.alphas[t, None], (loss.schedule.eps_coefs * loss.schedule.inv_sqrt_alphas)[t, None]
    begin, v = noisy / alpha.sqrt(), best + (-g / H)
    end = begin - c * eps
    inside = end.abs() <= 1
    assert (~inside).any() == (m_q < 1), "bounds stop some of the soft ones"
    near: Any = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(v, end.clamp(-1, 1), **near)
    torch.testing.assert_close((v - best)[inside], ((begin - best) / (1 + c * m_q * H))[inside], **near)
    first = inside & (t == 0)[:, None]
    alpha_0, sigma = loss.schedule.alphas[0], loss.schedule.sqrt_one_minus_alpha_hats[0]
    variance = (1 / alpha_0 - 1).sqrt() / m_q / H
    exact = sigma * (noisy - alpha_0.sqrt() * best) / (alpha_0 * variance + sigma**2)
    torch.testing.assert_close(eps[first], exact[first], **near)
    small = best + 0.05 * torch.randn(600, A).double()
    left = loss.slope_left(observation, small, 0.05 * noise, m_q).item()
    assert left == pytest.approx(1 / (1 + (1 / alpha_0 - 1).sqrt().item() * m_q * H), rel=1e-3)
    loss.m_q_slope = left
    assert variance_of_the_closed_form(loss) == pytest.approx(variance.item(), rel=1e-3)


@pytest.mark.parametrize("T", [5, 10, 20])
@pytest.mark.parametrize(("slope", "least", "most"), [(0.3, 0.735, 0.775), (0.15, 0.545, 0.585)])
def test_with_slopes_at_denoised_actions_m_q_and_the_deviation_in_closed_form(
    slope: float, least: float, most: float, T: int
) -> None:
    """With a denoiser that follows M_q; samples have 0.9 and more of the deviation that exact predictors give."""
    H = 4.0
    loss = made(Bowl(H), T, m_q_slope=slope, score_at="denoised")
    optimizer, found = torch.optim.Adam([loss.log_size], 0.005), []
    loss.denoiser = denoiser = cast(Any, Implicit(1.0, 0.0, loss.schedule))
    for i in range(1500):
        optimizer.zero_grad()
        batch = replay_batch(256, OBS, A, seed=i)
        batch["action"] *= 0.1
        m_q = loss.actor_loss(batch)[1]["m_q"].item()
        loss.m_q_loss(batch)[0].backward()
        optimizer.step()
        denoiser.k *= (m_q * H / denoiser.k) ** 0.1
        found.append(denoiser.k)
    v, alphas, coefs = variance_of_the_closed_form(loss), loss.schedule.alphas, loss.schedule.eps_coefs
    k = (1 - slope) / slope / (1 / alphas[0].item() - 1) ** 0.5
    assert sum(found[-750:]) / 750 == pytest.approx(k, rel=0.25)
    _, deviation = bowl_policy(loss.schedule, (k / (alphas.sqrt() + coefs * k)).tolist())
    exact = [(1 - a) ** 0.5 / (a * v + 1 - a) for a in loss.schedule.alpha_hats.tolist()]
    _, of_exact = bowl_policy(loss.schedule, exact)
    assert least < deviation / v**0.5 < most
    assert 0.89 < deviation / of_exact < 1


@pytest.mark.parametrize(
    ("T", "settings", "least", "most"),
    [
        (5, {"m_q_slope": 0.15}, 0.4, 0.75),
        (5, {"score_at": "denoised", "m_q_lr": 3e-3}, 0.45, 0.75),
        pytest.param(10, {"m_q_slope": 0.15}, 0.4, 0.75, marks=pytest.mark.slow),
        pytest.param(10, {"score_at": "denoised", "m_q_lr": 3e-3}, 0.6, 0.9, marks=pytest.mark.slow),
        pytest.param(20, {"m_q_slope": 0.15}, 0.4, 0.75, marks=pytest.mark.slow),
        pytest.param(20, {"score_at": "denoised", "m_q_lr": 3e-3}, 0.65, 0.95, marks=pytest.mark.slow),
    ],
    ids=["5", "5, denoised", "10", "10, denoised", "20", "20, denoised"],
)
def test_on_a_bandit_a_trained_denoiser_comes_to_the_same(
    T: int, settings: dict[str, Any], least: float, most: float
) -> None:
    """From scratch, learning from its own actions while M_q adapts."""
    torch.manual_seed(0)
    H, best, rounds = 4.0, 0.3, 1000
    loss = QSM(OBS, A, hidden=(64, 64), time_dim=16, T=T, m_q="auto", **({"m_q_lr": 1e-2} | settings))
    loss.critics = Bowl(H, best)
    sizes = {"params": [loss.log_size], "lr": loss.learning_rates["m_q"]}
    optimizer = torch.optim.Adam([{"params": loss.denoiser.parameters(), "lr": 2e-3}, sizes])
    observation = torch.zeros(256, OBS)
    actions, ends = 2 * torch.rand(1000, A) - 1, []
    for i in range(rounds):
        with torch.no_grad():
            actions = torch.cat([actions[32:], loss.exploration_policy().act(observation[:32])])
        drawn = actions[torch.randint(len(actions), (256,))]
        batch = TensorDict({"observation": observation, "action": drawn}, 256)
        optimizer.zero_grad()
        (loss.actor_loss(batch)[0] + loss.m_q_loss(batch)[0]).backward()
        optimizer.step()
        if i >= rounds // 2 and i % 50 == 0:
            with torch.no_grad():
                ends.append(loss.evaluation_policy().act(torch.zeros(4000, OBS)))
    found = torch.stack(ends)
    v = variance_of_the_closed_form(loss)
    assert found.mean() == pytest.approx(best, abs=0.02 if loss.score_at == "denoised" else 0.1)
    assert least * v**0.5 < found.std(1).mean() < most * v**0.5
    assert (found.abs() < 1).all()


@pytest.mark.parametrize("T", [5, 10, 20])
def test_samples_end_at_a_best_action_near_a_bound(T: int) -> None:
    loss = made(Bowl(4.0, -0.7), T, m_q_slope=0.0)
    denoiser: Any = Linear(settled(loss) * 4.0, -0.7)
    torch.manual_seed(1)
    noise = torch.randn(T + 1, 4000, A)
    found = reverse_process(denoiser, loss.schedule, torch.zeros(4000, OBS), noise[-1], noise[:-1])[-1]
    assert abs(found.mean() + 0.7) < 0.12
    assert found.std() < 0.12


@pytest.mark.parametrize("c", [0.003, 0.3, 30.0])
def test_a_slope_without_a_top_is_climbed_to_the_bounds_and_no_further(c: float) -> None:
    """rho is 1 while no step reaches them, and the share of the climb that they have not stopped when some do."""
    loss = made(Slope(c), m_q_slope=0.15)
    m_q = settled(loss)
    batch, z = replay_batch(4000, OBS, A), torch.randn(4000, A)
    alpha = loss.schedule.alphas[0]
    start = (alpha.sqrt() * batch["action"] + (1 - alpha).sqrt() * z) / alpha.sqrt()
    end = start + ((1 - alpha) / alpha).sqrt() * m_q * c
    moved = end.clamp(-1, 1) - start.clamp(-1, 1)
    assert (moved * (end <= 1)).sum() / moved.sum() == pytest.approx(0.15, abs=0.05)
    observation, action = batch["observation"], batch["action"]
    assert loss.slope_left(observation, action, z, 1e-5 / c) == pytest.approx(1.0, abs=0.01)
    assert loss.slope_left(observation, action, z, 1e9 / c) == 0


def test_without_any_slope_the_target_is_zero() -> None:
    """However large its size has become."""
    loss, batch = made(Slope(0.0)), replay_batch(256, OBS, A)
    with torch.no_grad():
        loss.log_size.fill_(100.0)  # whose exponential is inf
    value, metrics = loss.m_q_loss(batch)
    assert (metrics["slope_left"], loss.actor_loss(batch)[1]["m_q"]) == (0, 0)
    assert value.item() == pytest.approx(100 * loss.m_q_slope)
    t, noise = torch.randint(5, (256,)), torch.randn(256, A)
    for loss.m_q in ("auto", "batch"):
        value, eps, *_ = loss.score_matching(batch["observation"], batch["action"], t, noise)
        assert value.item() == eps.square().mean().item() > 0


def test_a_checkpoint_that_held_m_q_itself_goes_on_with_a_size_of_one() -> None:
    loss, other = made(Bowl(1.0)), made(Bowl(1.0))
    saved = loss.state_dict()
    saved["log_m_q"] = saved.pop("log_size") + 3
    with torch.no_grad():
        other.log_size.fill_(2.0)
    other.load_state_dict(saved)
    assert other.log_size.item() == 0
    assert "log_m_q" in saved


def test_the_share_of_the_slope_that_is_left_by_hand() -> None:
    loss = made(Bowl(2.0, 0.3))
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
    torch.testing.assert_close(loss.slope_left(batch["observation"], batch["action"], z, m_q), expected)


@pytest.mark.parametrize("score_at", ["clean", "denoised"])
def test_with_slopes_elsewhere_it_is_left_by_the_step_of_the_denoiser(score_at: str) -> None:
    """Which does not go along the slope of a noisy action; where it begins, the slope is that of a clean one."""
    loss = made(Bowl(2.0, 0.3), score_at=score_at)
    denoiser: Any = Linear(1.5, 1.0)
    loss.denoiser = denoiser
    alpha = loss.schedule.alphas[0]
    batch, z = replay_batch(32, OBS, A), torch.randn(32, A)
    noisy = alpha.sqrt() * batch["action"] + (1 - alpha).sqrt() * z
    far = (noisy + (1 - alpha).sqrt() * 1.5 * (1.0 - noisy)) / alpha.sqrt()
    begin, end = (noisy / alpha.sqrt()).clamp(-1, 1), far.clamp(-1, 1)
    assert 0 < (far.abs() > 1).sum() < far.numel(), "bounds stop some"
    left = (2 * (0.3 - end) * (end - begin))[far.abs() <= 1].sum()
    expected = left / (2 * (0.3 - begin) * (end - begin)).sum()
    for m_q in (0.0, 0.1, 10.0):  # which the denoiser may or may not have learned
        found = loss.slope_left(batch["observation"], batch["action"], z, m_q)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("score_at", ["clean", "denoised"])
@pytest.mark.parametrize("towards", [1.0, -1.0], ids=["up", "down"])
def test_where_q_is_linear_all_of_the_slope_is_left_up_and_down(towards: float, score_at: str) -> None:
    """Also on a step that an untrained denoiser takes downhill, and with slopes whose products overflow no share."""
    batch, z = replay_batch(4000, OBS, A), torch.randn(4000, A)
    batch["action"] *= 0.1
    for c in (1e-12, 1.0, 1e12):
        loss = made(Slope(c), score_at=score_at)
        denoiser: Any = Linear(0.1 * towards, 5.0)  # of steps that no bound stops
        loss.denoiser = denoiser
        assert loss.slope_left(batch["observation"], batch["action"], 0.1 * z) == pytest.approx(1.0)


def test_a_size_that_is_far_too_small_grows() -> None:
    """Where a denoiser's own errors are larger than its target, half of its steps go down."""
    torch.manual_seed(0)
    loss = made(Bowl(4.0), score_at="denoised")
    with torch.no_grad():
        loss.log_size.fill_(-8.0)
    sizes = {"params": [loss.log_size], "lr": 0.01}
    optimizer = torch.optim.Adam([{"params": loss.denoiser.parameters(), "lr": 1e-3}, sizes])
    for i in range(400):
        optimizer.zero_grad()
        batch = replay_batch(256, OBS, A, seed=i)
        (loss.actor_loss(batch)[0] + loss.m_q_loss(batch)[0]).backward()
        optimizer.step()
    assert loss.log_size.item() > -6.5


def test_it_is_what_the_denoiser_is_scaled_by_and_only_its_term_moves_it() -> None:
    torch.manual_seed(0)
    loss, batch = QSM(OBS, A, hidden=(8,), time_dim=8, m_q="auto"), replay_batch(256)
    assert loss.terms == ("qvalue", "actor", "m_q")
    with torch.no_grad():
        loss.log_size.fill_(1.5)
    t, noise = torch.randint(5, (256,)), torch.randn(256, A)
    value, eps, g, m_q = loss.score_matching(batch["observation"], batch["action"], t, noise)
    torch.testing.assert_close(m_q, torch.tensor([1.5]).exp() / g.abs().mean())
    torch.testing.assert_close(value, (eps + m_q * g).square().mean())
    for term in loss.terms:
        for p in loss.parameters():
            p.grad = None
        loss.term_loss(term, batch)[0].backward()
        assert (loss.log_size.grad is not None) == (term == "m_q")
    assert all(p.grad is None for name, p in loss.named_parameters() if name != "log_size")


def test_it_looks_at_every_fourth_frame() -> None:
    """So at both parts of a minibatch that is a dataset's for one half, and in K processes at what one looks at, where
    four divides the part of each."""
    loss, batch = made(Bowl(2.0, 0.3)), replay_batch(256, OBS, A)
    torch.manual_seed(0)
    value, _ = loss.m_q_loss(batch)
    batch["action"][torch.arange(256) % EVERY != 0] = torch.nan
    torch.manual_seed(0)
    assert loss.m_q_loss(batch)[0].item() == value.item()
    assert EVERY == 4


def test_a_batch_gives_the_target_its_size() -> None:
    """-sigma_t g / (0.1 mean |g|), so that rewards in other units change nothing."""
    torch.manual_seed(0)
    loss, batch = QSM(OBS, A, hidden=(8,), time_dim=8, m_q="batch", batch_temperature=0.2), replay_batch(64)
    t, noise = torch.randint(5, (64,)), torch.randn(64, A)
    value, eps, g, _ = loss.score_matching(batch["observation"], batch["action"], t, noise)
    sigma = (1 - loss.schedule.alpha_hats[t, None]).sqrt()
    torch.testing.assert_close(value, (eps + sigma * g / (0.2 * g.abs().mean())).square().mean())
    for critic in loss.critics.critics:  # type: ignore[union-attr]
        critic.layers[-1].weight.data *= 100
    torch.testing.assert_close(loss.score_matching(batch["observation"], batch["action"], t, noise)[0], value)


def test_a_run_adapts_and_saves_it(tmp_path: Path) -> None:
    run = trained(tmp_path, "--config=pendulum", *SHRINK, "--model.loss.m_q=auto")
    content = state(run)
    assert content["state_dict"]["loss.log_size"] != 0
    assert len(content["optimizer_states"]) == 3
    rate = content["optimizer_states"][2]["param_groups"][0]["lr"]
    assert content["updates"] > 0
    falling = 0.5 * (1 + math.cos(math.pi * content["updates"] / 2_000_000))  # with the denoiser's
    assert rate == pytest.approx(3e-3 * falling, rel=1e-12)


@pytest.mark.parametrize(
    "setting",
    [
        {"m_q": "often"},
        {"m_q": -1},
        {"batch_temperature": 0},
        {"m_q_lr": 0},
        {"m_q_slope": 1},
        {"m_q_slope": 0, "score_at": "denoised"},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(setting: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(setting))):
        QSM(OBS, A, **setting)
