"""Policies: exploration noise, device and shape handling, selection by the critics, and two modes at once."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from pytorch_lightning import Trainer, seed_everything
from tensordict import TensorDict
from torch import Tensor, nn

from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.losses import QSM
from qsm_lightning.module import OffPolicyModule
from qsm_lightning.policy import BestOfNPolicy, DiffusionPolicy, ExplorationPolicy, add_action_noise


def small() -> QSM:
    torch.manual_seed(0)
    return QSM(3, 2, hidden=(16,), time_dim=8)


def test_action_noise_is_scaled_and_clipped() -> None:
    action, noise = torch.tensor([[0.0, 0.99, -0.99]]), torch.tensor([[1.0, 1.0, -5.0]])
    torch.testing.assert_close(add_action_noise(action, noise, 0.1), torch.tensor([[0.1, 1.0, -1.0]]))


def test_exploration_adds_noise_to_the_same_action() -> None:
    loss, observation = small(), torch.randn(20_000, 3)
    torch.manual_seed(1)
    plain = DiffusionPolicy(loss.sampler).act(observation)
    torch.manual_seed(1)
    explored = ExplorationPolicy(DiffusionPolicy(loss.sampler), 0.1).act(observation)
    inside = (plain.abs() < 0.5).all(1)
    difference = (explored - plain)[inside]
    assert abs(difference.std().item() - 0.1) < 0.005
    assert explored.abs().max() <= 1


def test_any_batch_shape() -> None:
    policy = small().evaluation_policy()
    for shape in ((), (4,), (2, 5)):
        td = policy(TensorDict({"observation": torch.randn(*shape, 3)}, shape))
        assert td["action"].shape == (*shape, 2)
        assert not td["action"].requires_grad


def test_best_of_n_takes_the_candidate_the_smaller_critic_prefers() -> None:
    class Peak(nn.Module):
        """min over critics peaks at 0.5 in the first component; the second critic alone would mislead."""

        def forward(self, observation: Tensor, action: Tensor) -> Tensor:
            return torch.stack([-(action[:, 0] - 0.5).abs(), 10 * action[:, 1]])

    loss, observation = small(), torch.randn(50, 3)
    torch.manual_seed(3)
    chosen = BestOfNPolicy(loss.sampler, Peak(), 64).act(observation)
    torch.manual_seed(3)
    candidates = DiffusionPolicy(loss.sampler).act(observation.repeat_interleave(64, 0)).view(50, 64, 2)
    values = torch.minimum(-(candidates[..., 0] - 0.5).abs(), 10 * candidates[..., 1])
    expected = torch.stack([row[value.argmax()] for row, value in zip(candidates, values, strict=True)])
    torch.testing.assert_close(chosen, expected)


def test_noise_that_is_given_is_that_which_would_be_drawn() -> None:
    loss, observation = small(), torch.randn(7, 3)
    for policy in (DiffusionPolicy(loss.sampler), BestOfNPolicy(loss.sampler, loss.critics, 4)):
        torch.manual_seed(1)
        drawn = policy.act(observation)
        torch.manual_seed(1)
        noise = torch.randn(policy.noise_shape(7))
        assert torch.equal(policy.act(observation, noise), drawn)
    assert BestOfNPolicy(loss.sampler, loss.critics, 4).noise_shape(7) == (loss.schedule.T + 1, 7, 4, 2)


def test_policies_share_the_losss_parameters() -> None:
    loss = small()
    for policy in (loss.exploration_policy().policy, loss.evaluation_policy(), loss.evaluation_policy("best_of_n", 4)):
        assert policy.sampler.denoiser is loss.denoiser


def test_a_bandit_with_two_best_actions_keeps_both(tmp_path: Path) -> None:
    """Reward a^2 is best at -1 and at 1: after training each holds 30 % to 70 % of 1,000 samples.

    The whole trainer with its default M_q, on data that the policy collects itself.
    """
    seed_everything(0)
    data = OffPolicyDataModule(
        "tests.fake_envs:Bandit-v0",
        num_envs=4,
        total_frames=1_600,
        init_random_frames=400,
        batch_size=128,
        utd=0.5,
        eval_every_frames=1_600,
        eval_episodes=2,
    )
    module = OffPolicyModule(1, 1, partial(QSM, hidden=(64, 64), time_dim=16), critic_lr=1e-3, actor_lr=1e-3)
    trainer = Trainer(
        max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(module, data)
    assert data.progress.updates == 600
    torch.manual_seed(0)
    samples = module.loss.evaluation_policy().act(torch.zeros(1000, 1)).detach()[:, 0]
    for mode in (-1, 1):
        share = ((samples - mode).abs() < 0.2).float().mean().item()
        assert 0.3 <= share <= 0.7, (mode, share)
