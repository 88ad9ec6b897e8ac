r"""Q-score matching (Psenka, Escontrela, Abbeel and Ma, ICML 2024, arXiv 2312.11752).

Follows the authors' JAX code (github.com/Alescontrela/score_matching_rl), which the published curves came from:
the critic's gradient is taken at the *noisy* action (the paper's algorithm box has the clean one, ``score_at``), it
is the mean over both online critics, and the sign is minus: eps is regressed on :math:`-M_q \nabla_a Q`, because a
denoising step moves the action along -eps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from qsm_lightning.errors import require, require_positive
from qsm_lightning.losses.base import Metrics
from qsm_lightning.losses.diffusion import DiffusionLoss, networks
from qsm_lightning.networks import Denoiser, eps_given
from qsm_lightning.schedule import NoiseSchedule, ScheduleName


class QSMLoss(DiffusionLoss):
    r"""The two losses of Q-score matching, with the target critics inside.

    Args:
        denoiser: eps_theta(observation [B, O], noisy action [B, A], t [B]) -> [B, A].
        critics: (observation [B, O], action [B, A]) -> [ensemble, B].
        schedule: noise schedule, T steps.
        m_q: M_q, the inverse temperature (the paper's alpha).
        score_at: take the critics' gradient at the ``noisy`` action (authors' code) or the ``clean`` one (paper).
        bc_coef: weight of behaviour cloning: the loss of a denoiser of the buffer's own actions is added.
        **settings: the settings of :class:`DiffusionLoss`.

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

    compilable = True

    def __init__(
        self,
        denoiser: Denoiser,
        critics: nn.Module,
        schedule: NoiseSchedule,
        *,
        m_q: float = 50.0,
        score_at: Literal["noisy", "clean"] = "noisy",
        bc_coef: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(denoiser, critics, schedule, **settings)
        require_positive(m_q=m_q)
        require(score_at in ("noisy", "clean"), f"score_at is {score_at!r}: choose noisy or clean")
        require(bc_coef >= 0, f"bc_coef is {bc_coef}: it must not be negative")
        self.m_q = m_q
        self.score_at = score_at
        self.bc_coef = bc_coef

    def score_matching(
        self, observation: Tensor, action: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """mean (eps_theta(s, a_t, t) + M_q g)^2 for given ``t`` [B] and ``noise`` z [B, A] -> loss, eps, g.

        With ``bc_coef``, that times mean (eps_theta - z)^2 is added.
        """
        noisy = self.schedule.add_noise(action, t, noise)
        g = self.q_gradient(observation, noisy if self.score_at == "noisy" else action)
        eps = eps_given(self.denoiser, observation, self.schedule.T)(noisy, t).to(g)
        loss = (eps + self.m_q * g).square().mean()
        if self.bc_coef > 0:
            loss = loss + self.bc_coef * (eps - noise).square().mean()
        return loss, eps, g

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        """Score matching at a random step of the schedule on a replay batch [B]; no gradient reaches the critics."""
        observation, action = tensordict[self.tensor_keys.observation], tensordict[self.tensor_keys.action]
        t = torch.randint(self.schedule.T, (len(action),), device=action.device)
        loss, eps, g = self.score_matching(observation, action, t, torch.randn_like(action))
        return loss, {"q_grad_norm": g.norm(dim=-1).mean(), "eps_norm": eps.detach().norm(dim=-1).mean()}


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
        denoiser, critics, noise_schedule = networks(observation_dim, action_dim, hidden, time_dim, schedule, T)
        super().__init__(denoiser, critics, noise_schedule, **settings)
