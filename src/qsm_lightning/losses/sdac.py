r"""Soft diffusion actor-critic (Ma et al., ICML 2025, arXiv 2502.00361): reverse sampling score matching.

The denoiser learns the noise predictor of :math:`\pi(a|s) \propto \exp(Q(s, a) / \lambda)` without a sample of that
policy: for a noised action a_t, clean actions that could have led to it are drawn from the reverse of the forward
process and weighed by their values. As in the authors' code (github.com/mahaitongdae/diffusion_policy_online_rl) the
noised actions are those that the policy takes, which is the best of several samples, also in the TD target; its
lambda adapts, and here it is constant.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from qsm_lightning.errors import require_positive
from qsm_lightning.losses.base import Metrics
from qsm_lightning.losses.diffusion import SizedDiffusionLoss
from qsm_lightning.policy import check_samples
from qsm_lightning.precision import full_precision


class SDAC(SizedDiffusionLoss):
    """A diffusion policy trained on value-weighted noise.

    Args:
        observation_dim: O, width of the observation; known from the environment.
        action_dim: A, width of the action; known from the environment.
        entropy_coef: lambda, in units of the return.
        reverse_samples: clean actions drawn for each noised one.
        candidates: samples of which the best is taken when collecting and in the TD target.
        **settings: the settings of :class:`SizedDiffusionLoss`.

    Raises:
        SettingError: for a value outside its range.
    """

    compilable = True

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        entropy_coef: float = 5.0,
        reverse_samples: int = 64,
        candidates: int = 4,
        **settings: Any,
    ) -> None:
        require_positive(entropy_coef=entropy_coef)
        check_samples(reverse_samples, "reverse_samples")
        check_samples(candidates, "candidates")
        super().__init__(observation_dim, action_dim, **settings)
        self.entropy_coef = entropy_coef
        self.reverse_samples = reverse_samples
        self.candidates = candidates

    @torch.no_grad()
    @full_precision
    def target_noise(self, observation: Tensor, noisy: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """sum_k w_k z_k [B, A], with w = softmax_k(min_i Q_i(s, a_k) / lambda) and a_k from a_t and z_k.

        Args:
            observation: s, [B, O].
            noisy: a_t, [B, A].
            t: time indices, [B].
            noise: z, [K, B, A]; a_k = clip((a_t - sqrt(1 - abar_t) z_k) / sqrt(abar_t), -1, 1).
        """
        signal, spread = self.schedule.sqrt_alpha_hats[t, None], self.schedule.sqrt_one_minus_alpha_hats[t, None]
        clean = ((noisy - spread * noise) / signal).clamp(-1, 1)  # [K, B, A]
        wide = observation.expand(len(noise), *observation.shape)
        values = self.critics(wide.flatten(0, 1), clean.flatten(0, 1)).min(0).values.view(noise.shape[:2])  # [K, B]
        weights = (values / self.entropy_coef).softmax(0)
        return (weights[..., None] * noise).sum(0)

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        """mean (eps_theta(s, a_t, t) - weighed noise)^2 on a replay batch [B], at the actions of collecting, noised."""
        observation = tensordict[self.tensor_keys.observation]
        with torch.no_grad():
            action = self.next_action(observation)
        t = self.random_steps(action)
        noisy = self.schedule.add_noise(action, t, torch.randn_like(action))
        noise = torch.randn((self.reverse_samples, *action.shape), dtype=action.dtype, device=action.device)
        target = self.target_noise(observation, noisy, t, noise)
        eps = self.predicted_noise(observation, noisy, t)
        loss = (eps - target).square().mean()
        return loss, {"target_norm": target.norm(dim=-1).mean(), "eps_norm": eps.detach().norm(dim=-1).mean()}
