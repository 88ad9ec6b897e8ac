r"""What the diffusion policies of this folder share: twin critics trained by temporal differences, and a sampler.

Subclasses give the denoiser's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from qsm_lightning.errors import require, require_at_most, require_not_negative
from qsm_lightning.losses.base import (
    WIDEST,
    Metrics,
    OffPolicyLoss,
    check_gamma,
    check_hidden,
    check_tau,
    polyak_update,
)
from qsm_lightning.networks import Critics, Denoiser, eps_given
from qsm_lightning.policy import BestOfNPolicy, DiffusionPolicy, ExplorationPolicy, Policy, add_action_noise
from qsm_lightning.precision import full_precision
from qsm_lightning.sampler import Sampler
from qsm_lightning.schedule import NoiseSchedule, ScheduleName


class DiffusionLoss(OffPolicyLoss):
    r"""The critics' term of an actor-critic whose policy is a denoiser; ``actor_loss`` is for subclasses to define.

    Args:
        denoiser: eps_theta(observation [B, O], noisy action [B, A], t [B]) -> [B, A].
        critics: (observation [B, O], action [B, A]) -> [ensemble, B].
        schedule: noise schedule, T steps.
        gamma: discount, in [0, 1].
        tau: Polyak rate of the targets, in (0, 1].
        q_grad: whose action gradient is taken: the ``mean`` of the critics (QSM's authors' code), the smaller one
            (``min_q``), or the mean of the target critics (``target_mean``). Where training takes none, it is that of
            the policy picture.
        temperature: factor on the noise inside the reverse process.
        clip_sampler: clip the action to [-1, 1] after every step of the reverse process, not only at its end.
        action_noise: deviation of the noise added to actions when collecting and in the TD target (but diffusion_ql's).

    Raises:
        SettingError: for a value outside its range.
    """

    terms: tuple[str, ...] = ("qvalue", "actor")
    candidates = 1  # samples of which the best is taken when collecting and in the TD target: for subclasses to set

    def __init__(
        self,
        denoiser: Denoiser,
        critics: nn.Module,
        schedule: NoiseSchedule,
        *,
        gamma: float = 0.99,
        tau: float = 0.005,
        q_grad: Literal["mean", "min_q", "target_mean"] = "mean",
        temperature: float = 1.0,
        clip_sampler: bool = True,
        action_noise: float = 0.1,
    ) -> None:
        super().__init__()
        check_gamma(gamma)
        check_tau(tau)
        require(q_grad in ("mean", "min_q", "target_mean"), f"q_grad is {q_grad!r}: choose mean, min_q or target_mean")
        require_not_negative(temperature=temperature, action_noise=action_noise)
        self.denoiser = denoiser
        self.critics = critics
        self.target_critics = deepcopy(critics).requires_grad_(False)
        self.schedule = schedule
        self.gamma = gamma
        self.tau = tau
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
        """a' [B, A] for s' [B, O]: a sample, the best where several are drawn, plus the clipped action noise."""
        action = self.acting_policy().act(next_observation)
        return add_action_noise(action, torch.randn_like(action), self.action_noise)

    @torch.no_grad()
    @full_precision
    def td_target(
        self,
        reward: Tensor,
        terminated: Tensor,
        next_observation: Tensor,
        next_action: Tensor,
        discount: float | Tensor | None = None,
    ) -> Tensor:
        """y = r + gamma (1 - terminated) min_i Qbar_i(s', a'), [B]: a truncated step bootstraps, a terminated not."""
        gamma = self.gamma if discount is None else discount
        return reward + gamma * torch.where(terminated, 0.0, self.next_value(next_observation, next_action))

    def discount(self, following: TensorDictBase) -> float | Tensor:
        """What the value of what followed is multiplied with: gamma, or [B]."""
        return self.gamma

    def next_value(self, next_observation: Tensor, next_action: Tensor) -> Tensor:
        """min_i Qbar_i(s', a'), [B]."""
        return self.target_critics(next_observation, next_action).min(0).values

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        """Sum over critics of mean (Q_i(s, a) - y)^2 on a replay batch [B]; no gradient reaches the denoiser."""
        keys = self.tensor_keys
        following = tensordict["next"]
        reward = following[keys.reward].squeeze(-1)  # [B]
        terminated = following[keys.terminated].squeeze(-1)  # [B]
        next_observation = following[keys.observation]
        with torch.no_grad():
            next_action = self.next_action(next_observation)
        y = self.td_target(reward, terminated, next_observation, next_action, self.discount(following))
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

    # What the denoiser is trained by.

    @torch.no_grad()
    @full_precision
    def q_gradient(self, observation: Tensor, action: Tensor) -> Tensor:
        """g = grad_a Q(s, a) [B, A], of the critic that ``q_grad`` names; detached."""
        critics = self.target_critics if self.q_grad == "target_mean" else self.critics

        def value(action: Tensor) -> Tensor:
            q = critics(observation, action)  # [2, B]
            return (q.min(0).values if self.q_grad == "min_q" else q.mean(0)).sum()

        return torch.func.grad(value)(action)

    def random_steps(self, action: Tensor) -> Tensor:
        """t [B], uniform on 0, ..., T - 1."""
        return torch.randint(self.schedule.T, (len(action),), device=action.device)

    def predicted_noise(self, observation: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """eps_theta(s, a_t, t) [B, A] for a_t ``noisy`` [B, A] at steps ``t`` [B]."""
        return eps_given(self.denoiser, observation, self.schedule.T)(noisy, t).to(noisy)

    # What the trainer asks for.

    def term_modules(self, term: str) -> list[nn.Module]:
        return [self.critics] if term == "qvalue" else [self.denoiser]

    def update_targets(self) -> None:
        """Qbar_i <- (1 - tau) Qbar_i + tau Q_i."""
        polyak_update(self.critics, self.target_critics, self.tau)

    def exploration_policy(self) -> Policy:
        return ExplorationPolicy(self.acting_policy(), self.action_noise)

    def acting_policy(self) -> DiffusionPolicy:
        """What collects and is in the TD target, before noise: one sample, or the best of ``candidates``."""
        if self.candidates > 1:
            return BestOfNPolicy(self.sampler, self.critics, self.candidates)
        return DiffusionPolicy(self.sampler)

    def evaluation_policy(self, selector: str = "sample", n: int = 32) -> Policy:
        if selector == "best_of_n":
            return BestOfNPolicy(self.sampler, self.critics, n)
        return DiffusionPolicy(self.sampler)


class SizedDiffusionLoss(DiffusionLoss):
    """A diffusion policy with the networks of arXiv 2312.11752's code, built from sizes.

    Among a class's bases it stands before a :class:`DiffusionLoss` that is given its networks (:class:`QSM`).

    Args:
        observation_dim: O, width of the observation; known from the environment.
        action_dim: A, width of the action; known from the environment.
        hidden: widths of the hidden layers of denoiser and critics.
        time_dim: number of Fourier features of the time index, even.
        schedule: noise schedule: vp, cosine or linear.
        T: number of denoising steps, at least 1.
        **settings: the settings of :class:`DiffusionLoss`.

    Raises:
        SettingError: for a value outside its range.
    """

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
        check_hidden(hidden)
        require(time_dim > 0 and time_dim % 2 == 0, f"time_dim is {time_dim}: it must be even and greater than 0")
        require_at_most(WIDEST, time_dim=time_dim)
        denoiser = Denoiser(observation_dim, action_dim, hidden, time_dim)
        critics = Critics(observation_dim, action_dim, hidden)
        super().__init__(denoiser, critics, NoiseSchedule(schedule, T), **settings)


def climb(value: Callable[[Tensor], Tensor], action: Tensor) -> Tensor:
    """``value(action)``, a scalar: its gradient reaches what made the action, and not the critics in ``value``."""
    with torch.no_grad():
        g, q = torch.func.grad_and_value(value)(action.detach())
    return q + (g * (action - action.detach())).sum()
