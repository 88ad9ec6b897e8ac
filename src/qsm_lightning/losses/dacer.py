"""Diffusion actor-critic with entropy regulator (Wang et al., NeurIPS 2024, arXiv 2405.15177).

The denoiser climbs the smaller critic through the sampler. Actions have Gaussian noise whose deviation follows the
policy's entropy, which is that of a mixture of Gaussians fitted to samples.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from qsm_lightning.errors import require, require_package, require_positive
from qsm_lightning.losses.base import Metrics, check_entropy
from qsm_lightning.losses.diffusion import SizedDiffusionLoss, climb
from qsm_lightning.policy import DiffusionPolicy, Policy, add_action_noise, check_samples
from qsm_lightning.precision import full_precision
from qsm_lightning.sampler import Sampler

COMPONENTS = 3  # of the mixture


class DACER(SizedDiffusionLoss):
    """A diffusion policy trained through its sampler, with noise adapted to a target entropy.

    Args:
        observation_dim: O, width of the observation; known from the environment.
        action_dim: A, width of the action; known from the environment.
        alpha_init: alpha at the start; the noise on actions has the deviation action_noise * alpha.
        alpha_lr: learning rate of log alpha.
        alpha_every: updates between two estimates of the entropy, each a step of log alpha.
        target_entropy: the entropy in nats that alpha is adapted to; -0.9 A by default.
        entropy_samples: actions of each state of the batch that the mixture is fitted to, at least 3.
        policy_delay: updates of the critics for each one of denoiser and targets.
        **settings: the settings of :class:`SizedDiffusionLoss`.

    Raises:
        SettingError: for a value outside its range, or without scikit-learn.
    """

    terms = ("qvalue", "actor", "alpha")

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        alpha_init: float = 3.0,
        alpha_lr: float = 3e-2,
        alpha_every: int = 10_000,
        target_entropy: float | None = None,
        entropy_samples: int = 200,
        policy_delay: int = 2,
        **settings: Any,
    ) -> None:
        require_positive(alpha_init=alpha_init, alpha_lr=alpha_lr, alpha_every=alpha_every, policy_delay=policy_delay)
        require(
            entropy_samples >= COMPONENTS,
            f"entropy_samples is {entropy_samples}: it must be at least {COMPONENTS}, the Gaussians that are fitted",
        )
        check_samples(entropy_samples, "entropy_samples")
        check_entropy(target_entropy)
        require_package("sklearn", "modes", "dacer")
        super().__init__(observation_dim, action_dim, **settings)
        self.log_alpha = nn.Parameter(torch.full((1,), math.log(alpha_init)))
        self.target_entropy = -0.9 * action_dim if target_entropy is None else target_entropy
        self.entropy_samples = entropy_samples
        self.every = {"actor": policy_delay, "targets": policy_delay, "alpha": alpha_every}
        self.learning_rates = {"alpha": alpha_lr}

    @full_precision
    def next_action(self, next_observation: Tensor) -> Tensor:
        """a' [B, A]: as in collecting."""
        return self.exploration_policy().act(next_observation)

    @full_precision
    def climbing(self, observation: Tensor) -> Tensor:
        """-mean min_i Q_i(s, a) for observations [B, O], a as in collecting; it trains the denoiser alone."""
        action = self.next_action(observation)
        return -climb(lambda a: self.critics(observation, a).min(0).values.mean(), action)

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        """Climbing on a replay batch [B]."""
        loss = self.climbing(tensordict[self.tensor_keys.observation])
        return loss, {"alpha": self.log_alpha.detach().exp().squeeze()}

    def alpha_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        """(H - target) log alpha, H the estimated entropy in the states of a replay batch [B]."""
        entropy = self.entropy(tensordict[self.tensor_keys.observation])
        return ((entropy - self.target_entropy) * self.log_alpha).sum(), {"entropy": entropy}

    @torch.no_grad()
    def entropy(self, observation: Tensor) -> Tensor:
        """Mean over states [B, O] of the entropy in nats of the actions that are collected; scalar."""
        count = self.entropy_samples
        actions = self.next_action(observation.repeat_interleave(count, 0)).view(len(observation), count, -1)
        seed = int(torch.randint(2**31, ()))
        return torch.tensor(np.mean([mixture_entropy(a, seed) for a in actions.cpu().numpy()])).to(observation)

    def term_parameters(self, term: str) -> list[nn.Parameter]:
        return [self.log_alpha] if term == "alpha" else super().term_parameters(term)

    def exploration_policy(self) -> Policy:
        return EntropyPolicy(self.sampler, self.log_alpha, self.action_noise)


class EntropyPolicy(DiffusionPolicy):
    """A sample with Gaussian noise of deviation ``noise_std`` * alpha."""

    def __init__(self, sampler: Sampler, log_alpha: nn.Parameter, noise_std: float) -> None:
        super().__init__(sampler)
        self.log_alpha = log_alpha
        self.noise_std = noise_std

    def act(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        action = super().act(observation, noise)
        return add_action_noise(action, self.log_alpha.detach().exp() * torch.randn_like(action), self.noise_std)


def mixture_entropy(samples: np.ndarray, seed: int = 0) -> float:
    """Entropy in nats of samples [N, A]: of a fitted mixture, that of choosing a Gaussian plus the mean Gaussian's."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    if not np.isfinite(samples).all():
        return math.nan  # training has diverged, and is stopped for it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of samples that are all alike, at a bound
        fitted = GaussianMixture(COMPONENTS, random_state=seed).fit(samples)
    weights = fitted.weights_[fitted.weights_ > 0]
    each = (math.log(2 * math.pi * math.e) * samples.shape[1] + np.linalg.slogdet(fitted.covariances_)[1]) / 2
    return float(-(weights * np.log(weights)).sum() + (fitted.weights_ * each).sum())
