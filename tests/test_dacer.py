"""DACER where it is known in closed form, and who is trained by what."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qsm_lightning.errors import SettingError
from qsm_lightning.sampler import reverse_process
from tests.helpers import moved_away, replay_batch
from tests.test_compiled import run

pytest.importorskip("sklearn")
from qsm_lightning.losses.dacer import DACER, mixture_entropy

B, OBS, A = 32, 3, 2


def made(**settings: Any) -> DACER:
    """With targets that differ from what they follow."""
    torch.manual_seed(0)
    loss = DACER(OBS, A, hidden=(16, 16), time_dim=8, T=3, **settings)
    moved_away(loss.target_critics)
    return loss


def test_the_policy_climbs_the_smaller_critic_through_the_sampler() -> None:
    """Value and gradient equal those of the whole expression left to autograd, noise of alpha times 0.1 included."""
    loss, batch = made(alpha_init=2.0), replay_batch(B)
    torch.manual_seed(3)
    value, metrics = loss.actor_loss(batch)
    value.backward()
    found = [p.grad.clone() for p in loss.denoiser.parameters()]  # type: ignore[union-attr]
    torch.manual_seed(3)
    noise, z = torch.randn(4, B, A), torch.randn(B, A)
    observation = batch["observation"]
    sampled = reverse_process(loss.denoiser, loss.schedule, observation, noise[-1], noise[:-1])[-1]
    action = (sampled + 0.1 * 2.0 * z).clamp(-1, 1)
    expected = -loss.critics(observation, action).min(0).values.mean()
    torch.testing.assert_close(value, expected)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, list(loss.denoiser.parameters())), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)
    assert metrics["alpha"].item() == pytest.approx(2.0)


@pytest.mark.parametrize(("term", "trained"), [("qvalue", "critics"), ("actor", "denoiser"), ("alpha", "log_alpha")])
def test_gradients_are_isolated(term: str, trained: str) -> None:
    loss = made(entropy_samples=20)
    value, metrics = loss.term_loss(term, replay_batch(B))
    value.backward()
    reached = {name.partition(".")[0] for name, p in loss.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {trained}
    assert not any(metric.requires_grad for metric in metrics.values())
    assert loss.term_parameters("alpha") == [loss.log_alpha]


@pytest.mark.parametrize("dim", [1, 3])
def test_entropy_of_a_gaussian(dim: int) -> None:
    """ln det(2 pi e C) / 2; however the mixture splits it up, the choice between three adds no more than ln 3."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(dim, dim)) + 2 * np.eye(dim)
    samples = rng.normal(size=(4000, dim)) @ mix.T
    exact = np.linalg.slogdet(2 * math.pi * math.e * mix @ mix.T)[1] / 2
    assert exact - 0.05 < mixture_entropy(samples) < exact + math.log(3) + 0.05


def test_entropy_of_three_gaussians_apart() -> None:
    """ln 3 for the choice, and that of one of them."""
    rng = np.random.default_rng(0)
    samples = np.concatenate([rng.normal(center, 0.01, (1000, 1)) for center in (-0.8, 0.0, 0.8)])
    exact = math.log(3) + math.log(2 * math.pi * math.e * 0.01**2) / 2
    assert mixture_entropy(samples) == pytest.approx(exact, abs=0.05)


def test_actions_all_alike_have_a_finite_entropy() -> None:
    assert math.isfinite(mixture_entropy(np.ones((50, 2))))
    assert math.isnan(mixture_entropy(np.full((50, 2), np.nan))), "training has diverged"


def test_the_entropy_is_the_mean_over_states_of_that_of_collected_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, observation = made(entropy_samples=7), torch.rand(B, OBS) / 2
    assert loss.target_entropy == -0.9 * A
    spread = torch.linspace(-0.01, 0.01, 7 * B)[:, None]  # of the actions of a state, which tell the state
    samples: list[np.ndarray] = []

    def entropy(actions: np.ndarray, seed: int) -> float:
        samples.append(actions)
        return float(actions.mean())

    monkeypatch.setattr("qsm_lightning.losses.dacer.mixture_entropy", entropy)
    monkeypatch.setattr(loss, "next_action", lambda states: states[:, :A] + spread)
    found = loss.entropy(observation)
    assert [len(actions) for actions in samples] == [7] * B
    for actions, state in zip(samples, observation, strict=True):
        assert np.abs(actions - state[:A].numpy()).max() < 0.011
    assert found.item() == pytest.approx((observation[:, :A].mean() + spread.mean()).item(), abs=1e-6)


@pytest.mark.parametrize(("target", "sign"), [(50.0, -1), (-50.0, 1)])
def test_alpha_goes_towards_the_target_entropy(target: float, sign: int) -> None:
    """Descent raises it where the entropy is too low."""
    loss = made(target_entropy=target, entropy_samples=20)
    value, metrics = loss.alpha_loss(replay_batch(B))
    value.backward()
    assert loss.log_alpha.grad is not None
    assert loss.log_alpha.grad.item() == pytest.approx(metrics["entropy"].item() - target)
    assert math.copysign(1, loss.log_alpha.grad.item()) == sign


def test_collecting_has_noise_of_alpha_and_evaluation_none() -> None:
    loss, observation = made(action_noise=0.1), torch.randn(4000, OBS)
    with torch.no_grad():
        loss.log_alpha.fill_(math.log(0.5))
        for p in loss.denoiser.parameters():
            p.zero_()
        loss.temperature = 0.0
        torch.manual_seed(1)
        plain = loss.evaluation_policy().act(observation)
        torch.manual_seed(1)
        noisy = loss.exploration_policy().act(observation)
    inside = plain.abs() < 0.5
    assert (noisy - plain)[inside].std().item() == pytest.approx(0.05, rel=0.1)


def test_alpha_policy_and_targets_have_their_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run's 21 updates the policy and the targets make every third, and alpha every seventh."""
    moved: list[None] = []
    monkeypatch.setattr(DACER, "update_targets", lambda _: moved.append(None))
    sizes = {"hidden": (16, 16), "time_dim": 8, "T": 3, "entropy_samples": 5}
    settings = sizes | {"alpha_every": 7, "policy_delay": 3, "alpha_lr": 0.02}
    _, trainer = run(tmp_path, False, DACER, settings, updates=21, value=None)
    assert trainer.global_step == 21 + 7 + 3
    assert [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers] == [3e-4, 3e-4, 0.02]
    assert len(moved) == 7
    loss = made(alpha_every=7, policy_delay=3)
    assert (loss.every["targets"], loss.learning_rates) == (3, {"alpha": 3e-2})


@pytest.mark.parametrize(
    "setting",
    [
        {"alpha_init": 0},
        {"alpha_every": 0},
        {"policy_delay": 0},
        {"entropy_samples": 2},
        {"entropy_samples": 10**11},
        {"T": 0},
        {"target_entropy": math.inf},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(setting: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(setting))):
        DACER(OBS, A, **setting)
