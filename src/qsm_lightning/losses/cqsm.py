r"""Continuous-time Q-score matching (Hua, Gu and Tang, NeurIPS 2025, arXiv 2510.17122).

State and action move together, z = (x, a), dx = b(x, a) dt + noise, da = Psi(z) dt + noise, and the score Psi is what
is chosen. Its value,

.. math:: Q(z) = E \int_0^\infty e^{-\beta u} \left(r(z_u) - \frac{\lambda}{2} |\Psi(z_u)|^2\right) du,

needs no time step: the reward is a rate, beta is per second, and frames carry the time they took. Q is the value of Psi
if and only if :math:`e^{-\beta s} Q(z_s)` plus the discounted integral up to s is a martingale, which is what the
critics' losses ask for in three ways. The score that is best for a Q is :math:`\nabla_a Q / \lambda`, and the actor is
regressed on it: Q-score matching with M_q = 1 / lambda.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs import EnvBase

from qsm_lightning.continuous import TIME_STEP, moved, moving_action
from qsm_lightning.distributed import batch_mean
from qsm_lightning.errors import require, require_not_negative, require_positive
from qsm_lightning.losses.base import Metrics, OffPolicyLoss, check_hidden, check_tau, polyak_update
from qsm_lightning.losses.qsm import QSM
from qsm_lightning.networks import MLP, Critics, mish
from qsm_lightning.policy import Policy
from qsm_lightning.precision import full_precision


class CQSMLoss(OffPolicyLoss):
    r"""Evaluation and improvement of a score that moves the action.

    An observation is z = (x, a) [O], the action a last; what an environment gets is the velocity as a share of
    ``max_speed``, u = Psi / max_speed in [-1, 1]. See :class:`~qsm_lightning.continuous.MovingAction`.

    Args:
        score: z [..., O] -> u [..., A].
        critics: (x [..., O - A], a [..., A]) -> [ensemble, ...].
        action_dim: A.
        regularization: lambda, the price of speed.
        discount_rate: beta, per second.
        tau: Polyak rate of the target critics, in (0, 1]; 1 does without.
        max_speed: greatest speed of the action, per second, as in ``data.env``; None where neither speed nor action is
            bounded: u is then Psi itself.
        sigma: deviation of the noise in the action's motion after one second, as in ``data.env``.
        evaluation: how the martingale condition is asked for. ``orthogonality`` with the gradient of Q as test
            function: temporal differences over single frames. ``trace``: its exponentially discounted trace as test
            function. ``martingale``: the martingale loss, mean (Q - what followed)^2, over whole trajectories.
        window: frames that ``trace`` and ``martingale`` look ahead; for whole trajectories at least an episode's.
        trace_rate: rate per second with which the trace is forgotten.

    Raises:
        SettingError: for a value outside its range, or an environment whose actions do not move so.
    """

    terms = ("qvalue", "actor")
    selectors = ("sample",)
    compilable = True
    actor_lr_decay_updates = 2_000_000

    def __init__(
        self,
        score: nn.Module,
        critics: nn.Module,
        action_dim: int,
        *,
        regularization: float = 0.1,
        discount_rate: float = 0.2,
        tau: float = 0.005,
        max_speed: float | None = 20.0,
        sigma: float = 0.5,
        evaluation: Literal["orthogonality", "trace", "martingale"] = "orthogonality",
        window: int = 1,
        trace_rate: float = 1.0,
    ) -> None:
        super().__init__()
        require_positive(regularization=regularization, window=window, trace_rate=trace_rate, max_speed=max_speed)
        require_not_negative(discount_rate=discount_rate, sigma=sigma)
        check_tau(tau)
        require(
            evaluation in ("orthogonality", "trace", "martingale"),
            f"evaluation is {evaluation!r}: choose orthogonality, trace or martingale",
        )
        require(
            (window == 1) == (evaluation == "orthogonality"),
            f"window is {window}: with evaluation {evaluation} it must be "
            + ("1, as single frames are looked at" if evaluation == "orthogonality" else "at least 2"),
        )
        self.score = score
        self.critics = critics
        self.action_dim = action_dim
        self.target_critics = deepcopy(critics).requires_grad_(False)
        self.regularization = regularization
        self.discount_rate = discount_rate
        self.tau = tau
        self.max_speed = max_speed
        self.sigma = sigma
        self.evaluation = evaluation
        self.window = window
        self.trace_rate = trace_rate

    # The dynamics: what a frame tells of the present score.

    def velocity(self, z: Tensor) -> Tensor:
        """Psi(z), [..., A] for z [..., O]."""
        u = self.score(z)
        return u if self.max_speed is None else self.max_speed * u.clamp(-1, 1)

    def velocity_then(self, frames: TensorDictBase) -> Tensor:
        """Psi [..., A] with which the action was moved when the frames were collected."""
        return self.unit * frames[self.tensor_keys.action]

    @property
    def unit(self) -> float:
        """The velocity that the score's output 1 is."""
        return 1.0 if self.max_speed is None else self.max_speed

    def running(self, frames: TensorDictBase, velocity: Tensor) -> Tensor:
        r"""(r - lambda / 2 \|Psi\|^2) dt [...]; the reward of a frame is r dt already."""
        following = frames["next"]
        cost = 0.5 * self.regularization * velocity.square().sum(-1) * following[TIME_STEP].squeeze(-1)
        return following[self.tensor_keys.reward].squeeze(-1) - cost

    def next_state(self, frames: TensorDictBase, velocity: Tensor) -> Tensor:
        """z' [..., O] had ``velocity`` moved the action, with noise of its own; unbounded, with the noise there was.

        x' does not depend on it, as the action was a during the frame, and how the action moves is known. So frames of
        any score tell the value of this.
        """
        following = frames["next"]
        x, a_then = self.split(following[self.tensor_keys.observation])
        if self.max_speed is None:
            a = a_then + (velocity - self.velocity_then(frames)) * following[TIME_STEP]
        else:
            a = moved(self.split(frames[self._z])[1], velocity, following[TIME_STEP], self.sigma)
        return torch.cat([x, a], -1)

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z [..., O] -> x [..., O - A], a [..., A]."""
        return z[..., : -self.action_dim], z[..., -self.action_dim :]

    # The critics' term: the martingale condition.

    def value(self, z: Tensor) -> Tensor:
        """min_i Qbar_i(z), [...]."""
        return self.target_critics(*self.split(z)).min(0).values

    @torch.no_grad()
    @full_precision
    def target(self, z: Tensor, frames: TensorDictBase) -> Tensor:
        """What Q(z) of the (first) frames is regressed on, [B]."""
        terminated = frames["next", self.tensor_keys.terminated].squeeze(-1)
        velocity = self.velocity_then(frames) if self.evaluation == "martingale" else self.velocity(z)
        running = self.running(frames, velocity)
        discount = torch.exp(-self.discount_rate * frames["next", TIME_STEP].squeeze(-1))
        future = discount * torch.where(terminated, 0.0, self.value(self.next_state(frames, velocity)))
        if self.evaluation == "orthogonality":
            return one_step(running, future)
        if self.evaluation == "martingale":
            return whole_trajectory(running, discount, future, frames["in_window"])
        kept = discount * torch.exp(-self.trace_rate * frames["next", TIME_STEP].squeeze(-1))
        return traced(running, future, self.value(z), kept, frames["in_window"])

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        """Sum over critics of mean (Q_i(z) - y)^2 on a replay batch [B]; no gradient reaches the score.

        A frame of a whole trajectory has the weight of its time step: the martingale loss is an integral.
        """
        z = tensordict[self._z]
        y = self.target(z, tensordict)  # [B]
        q = self.critics(*self.split(self._first(z))).to(y)  # [ensemble, B]
        error = (q - y).square()
        if self.evaluation == "martingale":
            time_step = self._first(tensordict["next", TIME_STEP]).squeeze(-1)
            error = error * time_step / batch_mean(time_step)
        loss = error.mean(1).sum()
        q = q.detach()
        return loss, {"q_mean": q.mean(), "q_std": q.std(), "target_mean": y.mean()}

    # The actor's term: Q-score matching.

    @torch.no_grad()
    @full_precision
    def best_velocity(self, z: Tensor) -> Tensor:
        r"""grad_a Q(z) / lambda [B, A], of the mean of the critics, for z [B, O].

        It is where <Psi, grad_a Q> - lambda / 2 \|Psi\|^2 is greatest; with a bound on the speed that is cut at it.
        """
        x, a = self.split(z)
        slope = torch.func.grad(lambda a: self.critics(x, a).mean(0).sum())(a)
        best = slope / self.regularization
        return best if self.max_speed is None else best.clamp(-self.max_speed, self.max_speed)

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metrics]:
        """mean (u - best velocity / max_speed)^2 on a replay batch [B]; no gradient reaches the critics."""
        z = self._first(tensordict[self._z])
        best = self.best_velocity(z)
        u = self.score(z).to(best)
        loss = (u - best / self.unit).square().mean()
        return loss, {"speed": best.norm(dim=-1).mean()}

    # What the trainer asks for.

    @property
    def in_keys(self) -> list[NestedKey]:
        return [*super().in_keys, ("next", TIME_STEP), *(["in_window"] if self.window > 1 else [])]

    @property
    def _z(self) -> NestedKey:
        return self.tensor_keys.observation

    def _first(self, value: Tensor) -> Tensor:
        """Of windows [B, window, ...] the first frames [B, ...]."""
        return value[:, 0] if self.window > 1 else value

    def term_modules(self, term: str) -> list[nn.Module]:
        return [self.critics] if term == "qvalue" else [self.score]

    def update_targets(self) -> None:
        """Qbar_i <- (1 - tau) Qbar_i + tau Q_i."""
        polyak_update(self.critics, self.target_critics, self.tau)

    def check_env(self, env: EnvBase) -> None:
        check_timed(env)
        moving = moving_action(env)
        require(
            self.max_speed is not None,
            "model.loss.max_speed is null: give a number, and data.env the same, such as "
            "continuous:Pendulum-v1?max_speed=20",
        )
        there = (moving.time.max_speed, moving.time.sigma) if moving else (None, 0.0)
        require(
            there == (self.max_speed, self.sigma),
            f"model.loss.max_speed is {self.max_speed} and model.loss.sigma {self.sigma}: the action has to move so in "
            f"data.env, such as continuous:Pendulum-v1?max_speed={self.max_speed}&sigma={self.sigma}",
        )

    def exploration_policy(self) -> Policy:
        return ScorePolicy(self.score)

    def evaluation_policy(self, selector: str = "sample", n: int = 32) -> Policy:
        """The score; what is random about it is the noise of the action's dynamics, in the environment."""
        return ScorePolicy(self.score)


def one_step(running: Tensor, future: Tensor) -> Tensor:
    """y = (r - lambda / 2 |Psi|^2) dt + e^(-beta dt) Qbar(z'), [B].

    Descent on (Q(z) - y)^2 is the orthogonality condition's stochastic approximation with the gradient of Q(z) as test
    function: the increment of the martingale, dQ + (r - lambda / 2 |Psi|^2 - beta Q) dt, times that gradient.
    """
    return running + future


def traced(running: Tensor, future: Tensor, value: Tensor, kept: Tensor, inside: Tensor) -> Tensor:
    """y = Qbar(z_0) + sum_k e^(-(beta + kappa)(t_k - t_0)) (increment of the martingale in frame k), [B].

    With frame 0 at every place of a trajectory in turn, each increment meets all earlier gradients of Q, discounted:
    the trace. As future values are those of the present score, so is where this ends, whoever collected; but it may not
    get there from frames of a very different score with a slow ``trace_rate``.

    Args:
        running: (r - lambda / 2 |Psi|^2) dt, [B, W].
        future: e^(-beta dt) Qbar(z'), [B, W].
        value: Qbar(z), [B, W].
        kept: e^(-(beta + kappa) dt), [B, W].
        inside: which frames are of the window, [B, W].
    """
    weights = inside * _products_before(kept)
    return value[:, 0] + (weights * (running + future - value)).sum(1)


def whole_trajectory(running: Tensor, discount: Tensor, future: Tensor, inside: Tensor) -> Tensor:
    """y = sum_k e^(-beta (t_k - t_0)) (r - lambda / 2 |Psi|^2) dt + the value where the window ends, [B].

    A terminated trajectory ends with 0: its last reward has what the end is worth, h. It is the value of the score that
    collected.
    """
    weights = inside * _products_before(discount)
    last = inside.sum(1, keepdim=True) - 1
    return (weights * running).sum(1) + (weights * future).gather(1, last).squeeze(1)


def _products_before(factors: Tensor) -> Tensor:
    """1, f_0, f_0 f_1, ...: [B, W]."""
    return torch.cat([torch.ones_like(factors[:, :1]), factors[:, :-1]], 1).cumprod(1)


def check_timed(env: EnvBase) -> None:
    """Raise :class:`SettingError` unless an environment's frames carry their time step."""
    require(
        TIME_STEP in env.observation_spec,
        "data.env does not tell its time steps, which continuous time is about; write continuous: before its name, "
        "such as continuous:Pendulum-v1",
    )


class ScorePolicy(Policy):
    """The velocity u in [-1, 1] that a score gives for z = (x, a)."""

    def __init__(self, score: nn.Module) -> None:
        super().__init__()
        self.score = score

    def act(self, observation: Tensor) -> Tensor:
        return self.score(observation).clamp(-1, 1)


class CQSM(CQSMLoss):
    """:class:`CQSMLoss` with networks built from sizes: what ``--model.loss cqsm`` is.

    Args:
        observation_dim: O, width of (x, a); known from the environment.
        action_dim: A, width of the action; known from the environment.
        hidden: widths of the hidden layers of score and critics.
        **settings: the settings of :class:`CQSMLoss`.
    """

    compilable = True

    def __init__(
        self, observation_dim: int, action_dim: int, hidden: Sequence[int] = (512, 512), **settings: Any
    ) -> None:
        check_hidden(hidden)
        score = MLP([observation_dim, *hidden, action_dim], mish)
        x_dim = max(0, observation_dim - action_dim)
        super().__init__(score, Critics(x_dim, action_dim, hidden), action_dim, **settings)


class CQSMDiffusion(QSM):
    r"""QSM's diffusion policy with a critic in continuous time: each action is a fresh sample, held for its frame.

    Q(x, a) is then the value of a for one frame and of the policy from there on: y = r dt + e^(-beta dt) Qbar(x', a').
    The denoiser is regressed on -grad_a Q / lambda. No speed is paid for, as the action jumps and does not move. With
    ever shorter frames Q(x, a) depends ever less on a, by O(dt); where that matters, the action has to move
    (:class:`CQSM`).

    Args:
        observation_dim: O, width of the observation; known from the environment.
        action_dim: A, width of the action; known from the environment.
        regularization: lambda, 1 / M_q.
        discount_rate: beta, per second.
        **settings: the settings of :class:`QSM`, but for m_q, gamma and entropy_bonus.

    Raises:
        SettingError: for a value outside its range, or an environment that does not tell its time steps.
    """

    compilable = True
    fixed = ("m_q", "gamma", "entropy_bonus")

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        regularization: float = 0.02,
        discount_rate: float = 0.2,
        **settings: Any,
    ) -> None:
        require_positive(regularization=regularization)
        require_not_negative(discount_rate=discount_rate)
        super().__init__(observation_dim, action_dim, m_q=1 / regularization, gamma=1.0, entropy_bonus=0.0, **settings)
        self.discount_rate = discount_rate

    @property
    def in_keys(self) -> list[NestedKey]:
        return [*super().in_keys, ("next", TIME_STEP)]

    def discount(self, following: TensorDictBase) -> Tensor:
        """e^(-beta dt), [B]."""
        return torch.exp(-self.discount_rate * following[TIME_STEP].squeeze(-1))

    def check_env(self, env: EnvBase) -> None:
        check_timed(env)
