"""SDAC: the noise predictor of exp(Q / lambda), by quadrature, and who is trained by what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsm_lightning.errors import SettingError
from qsm_lightning.losses import SDAC
from tests.helpers import replay_batch

B, OBS, A = 32, 3, 2


def made(**settings: Any) -> SDAC:
    torch.manual_seed(0)
    return SDAC(OBS, A, **{"hidden": (16, 16), "time_dim": 8, "T": 3, "reverse_samples": 8, **settings})


class Parabola(nn.Module):
    """Both critics are -3 |a - 0.4|^2."""

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return (-3 * (action - 0.4).square().sum(-1)).expand(2, -1)


def test_the_target_is_the_noise_predictor_of_the_boltzmann_policy() -> None:
    """E[z | a_t] for a ~ exp(Q / lambda) on [-1, 1] under the forward process, by quadrature over a in one dimension.

    Reverse samples outside [-1, 1] are moved onto the bounds; here they are too far from the optimum to count.
    """
    torch.manual_seed(0)
    loss = SDAC(1, 1, hidden=(8,), time_dim=8, T=5, entropy_coef=0.05)
    loss.critics = Parabola()
    noisy, t = torch.tensor([[-0.2], [0.1], [0.5], [0.3], [0.0]]), torch.arange(5)
    found = loss.target_noise(torch.zeros(5, 1), noisy, t, torch.randn(400_000, 5, 1))
    a = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    for i in range(5):
        abar = loss.schedule.alpha_hats[i].double()
        z = (noisy[i].double() - abar.sqrt() * a) / (1 - abar).sqrt()
        density = torch.exp(-3 * (a - 0.4).square() / 0.05 - z.square() / 2)
        expected = (density * z).sum() / density.sum()
        assert abs(found[i].item() - expected.item()) < 0.02, i


class Different(nn.Module):
    """Critics that depend on the state, and neither of which is the smaller everywhere."""

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        one = -(action - observation[..., :A]).square().sum(-1)
        return torch.stack([one, observation[..., 0] * action.sum(-1)])


def test_the_target_weighs_noise_by_the_smaller_critic_at_clean_actions() -> None:
    """Frame by frame; noisy actions so far out that some clean ones lie on the bounds."""
    torch.manual_seed(1)
    loss = made(entropy_coef=0.3)
    loss.critics = critics = Different()
    observation, noisy, t = torch.randn(B, OBS), 4 * torch.rand(B, A) - 2, torch.randint(3, (B,))
    noise = torch.randn(8, B, A)
    found = loss.target_noise(observation, noisy, t, noise)
    for b in range(B):
        abar = loss.schedule.alpha_hats[t[b]]
        clean = ((noisy[b] - (1 - abar).sqrt() * noise[:, b]) / abar.sqrt()).clamp(-1, 1)
        values = critics(observation[b].expand(8, -1), clean).min(0).values
        torch.testing.assert_close(found[b], (values / 0.3).softmax(0) @ noise[:, b])


def test_the_denoiser_is_fitted_to_it_at_the_actions_of_collecting(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, batch = made(), replay_batch(B)
    action, target = torch.rand(B, A), torch.randn(B, A)
    given: list[Tensor] = []

    def target_noise(*args: Tensor) -> Tensor:
        given.extend(args)
        return target

    monkeypatch.setattr(loss, "next_action", lambda observation: action)
    monkeypatch.setattr(loss, "target_noise", target_noise)
    torch.manual_seed(1)
    value, metrics = loss.actor_loss(batch)
    torch.manual_seed(1)
    t = loss.random_steps(action)
    noisy = loss.schedule.add_noise(action, t, torch.randn(B, A))
    eps = loss.denoiser(batch["observation"], noisy, t)
    torch.testing.assert_close(value, (eps - target).square().mean())
    for found, expected in zip(given, (batch["observation"], noisy, t), strict=False):
        torch.testing.assert_close(found, expected)
    assert given[3].shape == (8, B, A)
    assert given[3].std().item() == pytest.approx(1, abs=0.1)
    assert metrics["target_norm"].item() == pytest.approx(target.norm(dim=-1).mean().item())
    assert metrics["eps_norm"].item() == pytest.approx(eps.norm(dim=-1).mean().item())


def test_the_next_action_is_the_best_sample_and_noise() -> None:
    loss, observation = made(action_noise=0.5), torch.randn(B, OBS)
    torch.manual_seed(1)
    found = loss.next_action(observation)
    torch.manual_seed(1)
    best = loss.evaluation_policy("best_of_n", 4).act(observation)
    assert torch.equal(found, (best + 0.5 * torch.randn(B, A)).clamp(-1, 1))


def test_the_best_sample_is_taken_for_the_target() -> None:
    loss, observation = made(candidates=64, action_noise=0.0), torch.randn(B, OBS)
    loss.critics = Parabola()
    chosen = loss.next_action(observation)
    plain = loss.sampler(observation)
    assert (chosen - 0.4).norm(dim=-1).mean() < 0.5 * (plain - 0.4).norm(dim=-1).mean()


@pytest.mark.parametrize(("term", "trained"), [("qvalue", "critics"), ("actor", "denoiser")])
def test_gradients_are_isolated(term: str, trained: str) -> None:
    loss = made()
    value, metrics = loss.term_loss(term, replay_batch(B))
    value.backward()
    for name in ("critics", "denoiser", "target_critics"):
        grads = [p.grad is not None and bool(p.grad.any()) for p in getattr(loss, name).parameters()]
        assert all(grads) if name == trained else not any(grads)
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize(
    "setting", [{"entropy_coef": 0}, {"reverse_samples": 0}, {"reverse_samples": 10**10}, {"candidates": 0}], ids=str
)
def test_values_out_of_range_are_refused_by_name(setting: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(setting))):
        made(**setting)
