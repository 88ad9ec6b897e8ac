r"""Q-score matching (Psenka, Escontrela, Abbeel and Ma, ICML 2024, arXiv 2312.11752).

Follows the authors' JAX code (github.com/Alescontrela/score_matching_rl), which the published curves came from:
the critic's gradient is taken at the *noisy* action (the paper's algorithm box has the clean one, ``score_at``), it
is the mean over both online critics, and the sign is minus: eps is regressed on :math:`-M_q \nabla_a Q`, because a
denoising step moves the action along -eps.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from qsm_lightning.distributed import batch_mean
from qsm_lightning.errors import require, require_not_negative, require_positive
from qsm_lightning.losses.base import Metrics
from qsm_lightning.losses.diffusion import DiffusionLoss, SizedDiffusionLoss
from qsm_lightning.networks import Denoiser
from qsm_lightning.policy import check_samples
from qsm_lightning.precision import full_precision
from qsm_lightning.schedule import NoiseSchedule

EVERY = 4  # m_q: auto looks at every fourth frame of a minibatch
RESOLUTION = 0.1  # in an action's range of -1 to 1: entropy_bonus counts hardly any finer spread


class QSMLoss(DiffusionLoss):
    r"""The two losses of Q-score matching, with the target critics inside.

    Args:
        denoiser: eps_theta(observation [B, O], noisy action [B, A], t [B]) -> [B, A].
        critics: (observation [B, O], action [B, A]) -> [ensemble, B].
        schedule: noise schedule, T steps.
        m_q: M_q, the inverse temperature (the paper's alpha). ``auto`` divides by mean |g| of the batch, and adapts the
            size that the target then has to the critics' curvature, so that the last denoising step leaves a set share
            of the slope (``m_q_slope``) and does not overshoot; ``batch`` gives the target a fixed size in every batch,
            -sigma_t g / (batch_temperature mean |g|).
        batch_temperature: of ``m_q: batch``.
        m_q_slope: share of the slope that ``m_q: auto`` leaves at the end of a step, below 1: more leaves the policy
            softer. With ``score_at: denoised`` it is above 0, else above -1, and 0 takes the step to the top or to the
            bounds.
        m_q_lr: learning rate of the logarithm of the target's size with ``m_q: auto``.
        score_at: take the critics' gradient at the ``noisy`` action (authors' code), the ``clean`` one (paper), or the
            ``denoised`` one, where the denoiser's own step from the noisy action ends, clipped to [-1, 1].
        bc_coef: weight of behaviour cloning: the loss of a denoiser of the buffer's own actions is added.
        candidates: samples of which the best by the smaller critic is taken when collecting and in the TD target, whose
            value is the target critics'.
        entropy_bonus: weight of the policy's entropy in the TD target, in units of the policy's temperature.
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
    actor_lr_decay_updates = 2_000_000

    def __init__(
        self,
        denoiser: Denoiser,
        critics: nn.Module,
        schedule: NoiseSchedule,
        *,
        m_q: float | Literal["auto", "batch"] = 50.0,
        batch_temperature: float = 0.1,
        m_q_slope: float = 0.3,
        m_q_lr: float = 3e-3,
        score_at: Literal["noisy", "clean", "denoised"] = "noisy",
        bc_coef: float = 0.0,
        candidates: int = 1,
        entropy_bonus: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(denoiser, critics, schedule, **settings)
        if isinstance(m_q, str):
            require(m_q in ("auto", "batch"), f"m_q is {m_q!r}: give a number, auto or batch")
        else:
            require_positive(m_q=m_q)
        require_positive(batch_temperature=batch_temperature, m_q_lr=m_q_lr)
        require(
            score_at in ("noisy", "clean", "denoised"), f"score_at is {score_at!r}: choose noisy, clean or denoised"
        )
        least = 0 if score_at == "denoised" else -1
        require(
            least < m_q_slope < 1,
            f"m_q_slope is {m_q_slope}: with score_at {score_at} it must be between {least} and 1",
        )
        require_not_negative(bc_coef=bc_coef, entropy_bonus=entropy_bonus)
        check_samples(candidates, "candidates")
        self.m_q = m_q
        self.score_at = score_at
        self.bc_coef = bc_coef
        self.candidates = candidates
        self.entropy_bonus = entropy_bonus
        self.batch_temperature = batch_temperature
        self.m_q_slope = m_q_slope
        if m_q == "auto":
            # Not a scalar: torch's compiler loses the gradient of one in float64.
            self.log_size = nn.Parameter(torch.zeros(1))
            self.terms = (*self.terms, "m_q")
            self.learning_rates = {"m_q": m_q_lr}

    def next_value(self, next_observation: Tensor, next_action: Tensor) -> Tensor:
        """min_i Qbar_i(s', a') + c tau (H(s') - mean H), [B]; c is ``entropy_bonus``, the mean that of all s' here."""
        value = super().next_value(next_observation, next_action)
        if self.entropy_bonus == 0:
            return value
        entropy = self.entropy(next_action, self.next_action(next_observation))
        tau = self.policy_temperature(next_observation, next_action)
        return value + self.entropy_bonus * tau * (entropy - batch_mean(entropy))

    @staticmethod
    def entropy(one: Tensor, other: Tensor) -> Tensor:
        """H [B], from two actions [B, A] of each state: sum_j log((a_j - a'_j)^2 / 2 + r^2) / 2.

        (a_j - a'_j)^2 / 2 estimates the variance of component j, and r is :data:`RESOLUTION`: where deviations are far
        above it, H is, but for a constant, the entropy of independent Gaussians.
        """
        return ((one - other).square() / 2 + RESOLUTION**2).log().sum(-1) / 2

    def policy_temperature(self, observation: Tensor, action: Tensor) -> float | Tensor:
        """tau = sqrt(1 - abar_0) / M_q: where eps = -M_q g the last step's score, -eps / sqrt(1 - abar_0), is g / tau.

        With ``m_q`` auto or batch M_q is that of the slopes at actions [B, A] in observations [B, O].
        """
        spread = self.schedule.sqrt_one_minus_alpha_hats[0]
        if not isinstance(self.m_q, str):
            return spread / self.m_q
        return spread * batch_mean(self.q_gradient(observation, action).abs()) / self.target_size(0)

    def score_matching(
        self, observation: Tensor, action: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, float | Tensor]:
        """mean (eps_theta(s, a_t, t) + M_q g)^2 for given ``t`` [B] and ``noise`` z [B, A] -> loss, eps, g, M_q.

        With ``bc_coef``, that times mean (eps_theta - z)^2 is added. eps and g are [B, A], M_q is as of :meth:`scale`.
        """
        noisy = self.schedule.add_noise(action, t, noise)
        eps = self.predicted_noise(observation, noisy, t)
        g = self.slopes(observation, action, noisy, t, eps)
        m_q = self.scale(g, t)
        loss = (eps + m_q * g).square().mean()
        if self.bc_coef > 0:
            loss = loss + self.bc_coef * (eps - noise).square().mean()
        return loss, eps, g, m_q

    @torch.no_grad()
    def slopes(self, observation: Tensor, action: Tensor, noisy: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The critics' gradient g [B, A] where ``score_at`` has it, eps [B, A] being the predicted noise."""
        if self.score_at == "noisy":
            return self.q_gradient(observation, noisy)
        if self.score_at == "clean":
            return self.q_gradient(observation, action)
        return self.q_gradient(observation, self.schedule.reverse_mean(noisy, t, eps).clamp(-1, 1))

    def scale(self, g: Tensor, t: Tensor) -> float | Tensor:
        """M_q, or what stands in its place, for slopes g [B, A] at steps t [B]: a number, [1] or [B, 1]."""
        if not isinstance(self.m_q, str):
            return self.m_q
        mean = batch_mean(g.abs())
        return torch.where(mean > 0, self.target_size(t) / mean.clamp(min=torch.finfo(g.dtype).tiny), 0.0)

    def target_size(self, t: int | Tensor) -> Tensor:
        """s, which M_q makes of mean |g|: of ``m_q`` auto [1], of batch at steps t [B, 1], or [1] for one number."""
        if self.m_q == "auto":
            return self.log_size.detach().exp()
        return self.schedule.sqrt_one_minus_alpha_hats[t, None] / self.batch_temperature

    @torch.no_grad()
    @full_precision
    def slope_left(self, observation: Tensor, action: Tensor, noise: Tensor, m_q: float | Tensor = 0.0) -> Tensor:
        r"""rho: the share of the critics' slope that is left where the last denoising step ends; scalar.

        From a_0 = sqrt(abar_0) a + sqrt(1 - abar_0) z the step goes from u = clip(a_0 / sqrt(alpha_0)) to v =
        clip(a_0 / sqrt(alpha_0) - c eps), c its coefficient. With ``score_at: noisy`` eps is -M_q g(a_0), which the
        denoiser is regressed on; otherwise it is what the denoiser gives: an average of -M_q g over the actions that
        a_0 may come from (``clean``), or -M_q g(v) (``denoised``). With D = v - u, and D' its components that no bound
        has cut short,

        .. math:: \rho = \sum_b g(v_b) \cdot D'_b / \sum_b g(w_b) \cdot D_b

        over the batch, w being a_0 with ``noisy``, else u: 1 where Q is linear along the step, 0 where it ends at the
        top or a bound, negative beyond; cut off at -1 and 1.

        Args:
            observation: s, [B, O].
            action: a, [B, A].
            noise: z, [B, A].
            m_q: M_q, a number or [1], which is for ``score_at: noisy``.
        """
        schedule = self.schedule
        t = torch.zeros(len(action), dtype=torch.long, device=action.device)
        noisy = schedule.add_noise(action, t, noise)
        begin = (noisy * schedule.inv_sqrt_alphas[0]).clamp(-1, 1)
        if self.score_at == "noisy":
            g = self.q_gradient(observation, noisy)
            eps = -m_q * g
        else:
            g = self.q_gradient(observation, begin)
            eps = self.predicted_noise(observation, noisy, t)
        reached = schedule.reverse_mean(noisy, 0, eps)
        end = reached.clamp(-1, 1)
        moved = end - begin
        free = moved * (reached == end)
        whole = batch_mean((g * moved).sum(-1))  # below 0 where an untrained denoiser goes down
        left = batch_mean((self.q_gradient(observation, end) * free).sum(-1))
        return torch.where(whole != 0, left / whole, 0.0).clamp(-1, 1)

    def m_q_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        """-(rho - m_q_slope) log size, rho held fixed: M_q grows while too much of the slope is left, else falls."""
        few = tensordict[::EVERY]
        observation, action = few[self.tensor_keys.observation], few[self.tensor_keys.action]
        m_q: float | Tensor = 0.0
        if self.score_at == "noisy":
            t = self.random_steps(action)
            noisy = self.schedule.add_noise(action, t, torch.randn_like(action))
            m_q = self.scale(self.q_gradient(observation, noisy), t)
        rho = self.slope_left(observation, action, torch.randn_like(action), m_q)
        loss = -((rho - self.m_q_slope) * self.log_size).sum()
        return loss, {"target_size": self.log_size.detach().exp().squeeze(), "slope_left": rho}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if state_dict.pop(f"{prefix}log_m_q", None) is not None:  # an older checkpoint's, which was M_q itself
            state_dict[f"{prefix}log_size"] = torch.zeros(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def term_parameters(self, term: str) -> list[nn.Parameter]:
        return [self.log_size] if term == "m_q" else super().term_parameters(term)

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        """Score matching at a random step of the schedule on a replay batch [B]; no gradient reaches the critics."""
        observation, action = tensordict[self.tensor_keys.observation], tensordict[self.tensor_keys.action]
        t = self.random_steps(action)
        loss, eps, g, m_q = self.score_matching(observation, action, t, torch.randn_like(action))
        metrics = {"q_grad_norm": g.norm(dim=-1).mean(), "eps_norm": eps.detach().norm(dim=-1).mean()}
        return loss, metrics | ({"m_q": cast(Tensor, m_q).squeeze()} if self.m_q == "auto" else {})


class QSM(SizedDiffusionLoss, QSMLoss):
    """:class:`QSMLoss` with the authors' networks, built from sizes: what ``model.loss`` in a configuration is.

    Its settings are those of :class:`SizedDiffusionLoss` and :class:`QSMLoss`.
    """

    compilable = True
