r"""Q-score matching (Psenka, Escontrela, Abbeel and Ma, ICML 2024, arXiv 2312.11752).

Follows the authors' JAX code (github.com/Alescontrela/score_matching_rl), which the published curves came from:
the critic's gradient is taken at the *noisy* action (the paper's algorithm box has the clean one, ``score_at``), it
is the mean over both online critics, and the sign is minus: eps is regressed on :math:`-M_q \nabla_a Q`, because a
denoising step moves the action along -eps.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from qsm_lightning.errors import require, require_positive
from qsm_lightning.losses.base import Metrics, OffPolicyLoss, polyak_update
from qsm_lightning.networks import Critics, Denoiser, eps_given
from qsm_lightning.policy import BestOfNPolicy, ExplorationPolicy, Policy, add_action_noise
from qsm_lightning.precision import full_precision
from qsm_lightning.sampler import Sampler
from qsm_lightning.schedule import NoiseSchedule, ScheduleName


class QSMLoss(OffPolicyLoss):
    r"""The two losses of Q-score matching, with the target critics inside.

    Args:
        denoiser: eps_theta(observation [B, O], noisy action [B, A], t [B]) -> [B, A].
        critics: (observation [B, O], action [B, A]) -> [ensemble, B].
        schedule: noise schedule, T steps.
        gamma: discount, in [0, 1].
        tau: Polyak rate of the target critics, in (0, 1].
        m_q: M_q, the inverse temperature (the paper's alpha).
        score_at: take the critics' gradient at the ``noisy`` action (authors' code) or the ``clean`` one (paper).
        q_grad: ``mean`` of the critics' gradients (authors' code) or the gradient of the smaller critic, ``min_q``.
        temperature: factor on the noise inside the reverse process.
        clip_sampler: clip the action to [-1, 1] after every step of the reverse process, not only at its end.
        action_noise: deviation of the noise added to actions when collecting and in the TD target.

    Raises:
        SettingError: for a value outside its range.

    Examples:
        >>> from qsm_lightning.losses import QSMLoss
        >>> from qsm_lightning.networks import Critics, Denoiser
        >>> from qsm_lightning.schedule import NoiseSchedule
        >>> loss = QSMLoss(Denoiser(3, 1), Critics(3, 1), NoiseSchedule("vp", 5))
        >>> loss.in_keys
        ['observation', 'action', ('next', 'observation'), ('next', 'reward'), ('next', 'terminated')]
        >>> loss.out_keys
        ['loss_qvalue', 'loss_actor']
    """

    terms = ("qvalue", "actor")
    compilable = True

    def __init__(
        self,
        denoiser: Denoiser,
        critics: nn.Module,
        schedule: NoiseSchedule,
        *,
        gamma: float = 0.99,
        tau: float = 0.005,
        m_q: float = 50.0,
        score_at: Literal["noisy", "clean"] = "noisy",
        q_grad: Literal["mean", "min_q"] = "mean",
        temperature: float = 1.0,
        clip_sampler: bool = True,
        action_noise: float = 0.1,
    ) -> None:
        super().__init__()
        require(0 <= gamma <= 1, f"gamma is {gamma}: it must be between 0 and 1")
        require(0 < tau <= 1, f"tau is {tau}: it must be above 0 and at most 1")
        require_positive(m_q=m_q)
        require(score_at in ("noisy", "clean"), f"score_at is {score_at!r}: choose noisy or clean")
        require(q_grad in ("mean", "min_q"), f"q_grad is {q_grad!r}: choose mean or min_q")
        require(temperature >= 0, f"temperature is {temperature}: it must not be negative")
        require(action_noise >= 0, f"action_noise is {action_noise}: it must not be negative")
        self.denoiser = denoiser
        self.critics = critics
        self.target_critics = deepcopy(critics).requires_grad_(False)
        self.schedule = schedule
        self.gamma = gamma
        self.tau = tau
        self.m_q = m_q
        self.score_at = score_at
        self.q_grad = q_grad
        self.temperature = temperature
        self.clip_sampler = clip_sampler
        self.action_noise = action_noise

    @property
    def sampler(self) -> Sampler:
        """The reverse process with this loss's networks and settings."""
        return Sampler(self.denoiser, self.schedule, self.temperature, self.clip_sampler)

    # The critic's term: temporal difference learning.

    @full_precision
    def next_action(self, next_observation: Tensor) -> Tensor:
        """a' [B, A]: the reverse process on s' [B, O], plus the clipped action noise."""
        action = self.sampler(next_observation)
        return add_action_noise(action, torch.randn_like(action), self.action_noise)

    @torch.no_grad()
    @full_precision
    def td_target(self, reward: Tensor, terminated: Tensor, next_observation: Tensor, next_action: Tensor) -> Tensor:
        """y = r + gamma (1 - terminated) min_i Qbar_i(s', a'), [B]: a truncated step bootstraps, a terminated not."""
        next_value = self.target_critics(next_observation, next_action).min(0).values  # [B]
        return reward + self.gamma * torch.where(terminated, 0.0, next_value)

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        """Sum over critics of mean (Q_i(s, a) - y)^2 on a replay batch [B]; no gradient reaches the denoiser."""
        keys = self.tensor_keys
        following = tensordict["next"]
        reward = following[keys.reward].squeeze(-1)  # [B]
        terminated = following[keys.terminated].squeeze(-1)  # [B]
        next_observation = following[keys.observation]
        with torch.no_grad():
            next_action = self.next_action(next_observation)
        y = self.td_target(reward, terminated, next_observation, next_action)
        q = self.critics(tensordict[keys.observation], tensordict[keys.action]).to(y)  # [2, B]
        if q.shape[1:] != y.shape:
            raise RuntimeError(f"critics gave values of shape {tuple(q.shape)} for TD targets {tuple(y.shape)}")
        loss = (q - y).square().mean(1).sum()
        q = q.detach()
        return loss, {
            "q_mean": q.mean(),
            "q_std": q.std(),
            "q_disagreement": (q.max(0).values - q.min(0).values).mean(),
            "td_target_mean": y.mean(),
        }

    # The denoiser's term: matching the score to the critic's action gradient.

    @torch.no_grad()
    @full_precision
    def q_gradient(self, observation: Tensor, action: Tensor) -> Tensor:
        """g = grad_a Q(s, a) [B, A], of the mean or the smaller of the online critics; detached."""

        def value(action: Tensor) -> Tensor:
            q = self.critics(observation, action)  # [2, B]
            return (q.mean(0) if self.q_grad == "mean" else q.min(0).values).sum()

        return torch.func.grad(value)(action)

    def score_matching(
        self, observation: Tensor, action: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """mean (eps_theta(s, a_t, t) + M_q g)^2 for given ``t`` [B] and ``noise`` [B, A] -> loss, eps, g."""
        noisy = self.schedule.add_noise(action, t, noise)
        g = self.q_gradient(observation, noisy if self.score_at == "noisy" else action)
        eps = eps_given(self.denoiser, observation, self.schedule.T)(noisy, t).to(g)
        return (eps + self.m_q * g).square().mean(), eps, g

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        """Score matching at a random step of the schedule on a replay batch [B]; no gradient reaches the critics."""
        observation, action = tensordict[self.tensor_keys.observation], tensordict[self.tensor_keys.action]
        t = torch.randint(self.schedule.T, (len(action),), device=action.device)
        loss, eps, g = self.score_matching(observation, action, t, torch.randn_like(action))
        return loss, {"q_grad_norm": g.norm(dim=-1).mean(), "eps_norm": eps.detach().norm(dim=-1).mean()}

    # What the trainer asks for.

    def term_modules(self, term: str) -> list[nn.Module]:
        return [self.critics] if term == "qvalue" else [self.denoiser]

    def update_targets(self) -> None:
        """Qbar_i <- (1 - tau) Qbar_i + tau Q_i."""
        polyak_update(self.critics, self.target_critics, self.tau)

    def exploration_policy(self) -> Policy:
        return ExplorationPolicy(self.sampler, self.action_noise)

    def evaluation_policy(self, selector: str = "sample", n: int = 32) -> Policy:
        if selector == "best_of_n":
            return BestOfNPolicy(self.sampler, self.critics, n)
        return Policy(self.sampler)


class QSM(QSMLoss):
    """:class:`QSMLoss` with the authors' networks, built from sizes: what ``model.loss`` in a configuration is.

    Args:
        observation_dim: O, width of the observation; known from the environment.
        action_dim: A, width of the action; known from the environment.
        hidden: widths of the hidden layers of denoiser and critics.
        time_dim: number of Fourier features of the time index, even.
        schedule: noise schedule: vp, cosine or linear.
        T: number of denoising steps, at least 1.
        **settings: the settings of :class:`QSMLoss`.
    """

    compilable = True

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int] = (512, 512),
        time_dim: int = 64,
        schedule: ScheduleName = "vp",
        T: int = 5,
        **settings: Any,
    ) -> None:
        require(len(hidden) > 0, "hidden is empty: give at least one layer width, such as [256, 256]")
        require(all(width > 0 for width in hidden), f"hidden is {list(hidden)}: every width must be greater than 0")
        require(time_dim > 0 and time_dim % 2 == 0, f"time_dim is {time_dim}: it must be even and greater than 0")
        super().__init__(
            Denoiser(observation_dim, action_dim, hidden, time_dim),
            Critics(observation_dim, action_dim, hidden),
            NoiseSchedule(schedule, T),
            **settings,
        )
