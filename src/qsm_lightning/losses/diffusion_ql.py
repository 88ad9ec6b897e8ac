r"""Diffusion Q-learning (Wang, Hunt and Zhou, ICLR 2023, arXiv 2208.06193).

The denoiser clones the buffer's actions and, through the sampler, climbs the critics. Networks and sampler are those of
QSM here; as in the authors' code (github.com/Zhendong-Wang/Diffusion-Policies-for-Offline-RL), the TD target samples
from a slowly following copy of the denoiser, and either critic is climbed, by chance, in units of the other's mean
magnitude.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from qsm_lightning.distributed import batch_mean
from qsm_lightning.errors import require_not_negative
from qsm_lightning.losses.base import Metrics, polyak_update
from qsm_lightning.losses.diffusion import SizedDiffusionLoss, climb
from qsm_lightning.policy import check_samples
from qsm_lightning.precision import full_precision
from qsm_lightning.sampler import Sampler


class DiffusionQL(SizedDiffusionLoss):
    """A diffusion policy trained through its sampler.

    Args:
        observation_dim: O, width of the observation; known from the environment.
        action_dim: A, width of the action; known from the environment.
        eta: weight of the critics against behaviour cloning; 1 where a dataset is to be stayed close to.
        max_q_backup: sampled next actions of which the TD target takes the best, for each critic; 1 for no choice.
        **settings: the settings of :class:`SizedDiffusionLoss`.

    Raises:
        SettingError: for a value outside its range.
    """

    compilable = True

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        eta: float = 200.0,
        max_q_backup: int = 1,
        **settings: Any,
    ) -> None:
        require_not_negative(eta=eta)
        check_samples(max_q_backup, "max_q_backup")
        super().__init__(observation_dim, action_dim, **settings)
        self.eta = eta
        self.max_q_backup = max_q_backup
        self.target_denoiser = deepcopy(self.denoiser).requires_grad_(False)

    @property
    def target_sampler(self) -> Sampler:
        """The reverse process of the denoiser's slow copy."""
        return Sampler(self.target_denoiser, self.schedule, self.temperature, self.clip_sampler)

    @full_precision
    def next_action(self, next_observation: Tensor) -> Tensor:
        """a' [n B, A]: ``max_q_backup`` samples for each s' [B, O], by the denoiser's slow copy."""
        return self.target_sampler(next_observation.repeat_interleave(self.max_q_backup, 0))

    def next_value(self, next_observation: Tensor, next_action: Tensor) -> Tensor:
        """min_i max_n Qbar_i(s', a'_n), [B]."""
        values = self.target_critics(next_observation.repeat_interleave(self.max_q_backup, 0), next_action)
        return values.view(len(values), -1, self.max_q_backup).max(-1).values.min(0).values

    def cloning(self, observation: Tensor, action: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """mean (eps_theta(s, a_t, t) - z)^2 for given ``t`` [B] and ``noise`` z [B, A]."""
        noisy = self.schedule.add_noise(action, t, noise)
        return (self.predicted_noise(observation, noisy, t) - noise).square().mean()

    @full_precision
    def climbing(self, observation: Tensor, first: Tensor) -> Tensor:
        """-mean Q_i(s, a) / mean |Q_j(s, a)| for sampled a, with i the first critic where ``first`` is true.

        Its gradient reaches the denoiser through the sampler, and not the critics.
        """
        action = self.sampler(observation)

        def value(action: Tensor) -> Tensor:
            q = self.critics(observation, action)  # [2, B]
            sizes = torch.stack([batch_mean(values.abs()) for values in q])  # both: ranks may choose differently
            own, other = q.mean(1), sizes.flip(0)
            return torch.where(first, own[0] / other[0], own[1] / other[1])

        return -climb(value, action)

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        """Cloning plus eta times climbing on a replay batch [B]."""
        observation, action = tensordict[self.tensor_keys.observation], tensordict[self.tensor_keys.action]
        t = self.random_steps(action)
        bc = self.cloning(observation, action, t, torch.randn_like(action))
        q = self.climbing(observation, torch.rand((), device=action.device) < 0.5)
        return bc + self.eta * q, {"bc_loss": bc.detach(), "q_loss": q.detach()}

    def update_targets(self) -> None:
        """Critics and denoiser: target <- (1 - tau) target + tau online."""
        super().update_targets()
        polyak_update(self.denoiser, self.target_denoiser, self.tau)
