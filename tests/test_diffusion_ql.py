"""Diffusion Q-learning where it is known in closed form, and who is trained by what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qsm_lightning.errors import SettingError
from qsm_lightning.losses import DiffusionQL
from qsm_lightning.sampler import reverse_process
from tests.helpers import moved_away, replay_batch

B, OBS, A = 32, 3, 2


def made(**settings: Any) -> DiffusionQL:
    """With targets that differ from what they follow."""
    torch.manual_seed(0)
    loss = DiffusionQL(OBS, A, hidden=(16, 16), time_dim=8, T=3, **settings)
    moved_away(loss.target_critics, loss.target_denoiser)
    return loss


def test_cloning_is_the_denoisers_loss() -> None:
    loss, batch = made(), replay_batch(B)
    t, noise = torch.randint(3, (B,)), torch.randn(B, A)
    abar = loss.schedule.alpha_hats[t, None]
    noisy = abar.sqrt() * batch["action"] + (1 - abar).sqrt() * noise
    expected = (loss.denoiser(batch["observation"], noisy, t) - noise).square().mean()
    torch.testing.assert_close(loss.cloning(batch["observation"], batch["action"], t, noise), expected)


@pytest.mark.parametrize("first", [True, False])
def test_climbing_differentiates_through_the_sampler(first: bool) -> None:
    """Value and gradient equal those of the whole expression left to autograd."""
    loss, observation = made(), torch.randn(B, OBS)
    torch.manual_seed(3)
    value = loss.climbing(observation, torch.tensor(first))
    value.backward()
    found = [p.grad.clone() for p in loss.denoiser.parameters()]  # type: ignore[union-attr]
    assert all(p.grad is None for p in loss.critics.parameters())
    torch.manual_seed(3)
    noise = torch.randn(4, B, A)
    action = reverse_process(loss.denoiser, loss.schedule, observation, noise[-1], noise[:-1])[-1]
    q = loss.critics(observation, action)
    i, j = (0, 1) if first else (1, 0)
    expected = -q[i].mean() / q[j].abs().mean().detach()
    torch.testing.assert_close(value, expected)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, list(loss.denoiser.parameters())), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_the_actor_clones_the_buffer_and_climbs_one_critic_of_two() -> None:
    loss, batch, chosen = made(eta=3.0), replay_batch(B), set()
    observation, action = batch["observation"], batch["action"]
    for seed in range(10):
        torch.manual_seed(seed)
        value, metrics = loss.actor_loss(batch)
        torch.manual_seed(seed)
        cloning = loss.cloning(observation, action, loss.random_steps(action), torch.randn(B, A))
        first = torch.rand(()) < 0.5
        climbing = loss.climbing(observation, first)
        torch.testing.assert_close(value, cloning + 3.0 * climbing)
        torch.testing.assert_close(metrics, {"bc_loss": cloning.detach(), "q_loss": climbing.detach()})
        chosen.add(bool(first))
    assert chosen == {True, False}


def test_the_settings_of_the_sampler_are_those_of_the_slow_copy_too() -> None:
    sampler = made(temperature=0.3, clip_sampler=False).target_sampler
    assert (sampler.temperature, sampler.clip) == (0.3, False)


@pytest.mark.parametrize("first", [True, False])
def test_ranks_that_choose_differently_send_the_same(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Magnitudes are averaged over ranks: each sends the first critic's, then the second's."""
    loss, observation, sent = made(), torch.randn(B, OBS), []

    def mean(values: Tensor) -> Tensor:
        sent.append(values.detach().mean())
        return sent[-1]

    monkeypatch.setattr("qsm_lightning.losses.diffusion_ql.batch_mean", mean)
    torch.manual_seed(3)
    loss.climbing(observation, torch.tensor(first))
    torch.manual_seed(3)
    expected = loss.critics(observation, loss.sampler(observation)).abs().mean(1)
    torch.testing.assert_close(torch.stack(sent), expected)


def test_the_target_takes_the_best_of_several_actions() -> None:
    """max over samples for each critic, then the smaller critic; samples come from the slow copy."""
    loss, batch = made(max_q_backup=4, gamma=0.9), replay_batch(B)
    for p in loss.denoiser.parameters():
        p.data.zero_()
    following = batch["next"]
    torch.manual_seed(2)
    action = loss.next_action(following["observation"])
    torch.manual_seed(2)
    assert torch.equal(action, loss.target_sampler(following["observation"].repeat_interleave(4, 0)))
    reward, terminated = following["reward"][:, 0], following["terminated"][:, 0]
    y = loss.td_target(reward, terminated, following["observation"], action)
    for b in range(B):
        values = loss.target_critics(following["observation"][b].expand(4, -1), action[4 * b : 4 * b + 4])
        best = min(values[0].max(), values[1].max())
        torch.testing.assert_close(y[b], reward[b] + (0.0 if terminated[b] else 0.9 * best))


@pytest.mark.parametrize(("term", "trained"), [("qvalue", "critics"), ("actor", "denoiser")])
def test_gradients_are_isolated(term: str, trained: str) -> None:
    loss = made()
    value, metrics = loss.term_loss(term, replay_batch(B))
    value.backward()
    for name in ("critics", "denoiser", "target_critics", "target_denoiser"):
        grads = [p.grad is not None and bool(p.grad.any()) for p in getattr(loss, name).parameters()]
        assert all(grads) if name == trained else not any(grads)
    assert not any(metric.requires_grad for metric in metrics.values())


def test_both_targets_follow() -> None:
    loss = made(tau=0.25)
    pairs = [(loss.critics, loss.target_critics), (loss.denoiser, loss.target_denoiser)]
    expected: list[list[Tensor]] = []
    for online, target in pairs:
        for p in online.parameters():
            p.data += 1
        expected.append([0.75 * t + 0.25 * p for t, p in zip(target.parameters(), online.parameters(), strict=True)])
    loss.update_targets()
    for (_, target), wanted in zip(pairs, expected, strict=True):
        for p, value in zip(target.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.data, value.data)


@pytest.mark.parametrize("setting", [{"eta": -1}, {"max_q_backup": 0}, {"max_q_backup": 10**10}, {"T": 0}], ids=str)
def test_values_out_of_range_are_refused_by_name(setting: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(setting))):
        DiffusionQL(OBS, A, **setting)
