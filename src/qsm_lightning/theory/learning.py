"""Linear-quadratic control learned by :class:`~qsm_lightning.losses.CQSMLoss`, to be measured against the closed form.

A discrete method's discount is one number per step; that is CQSM with beta = -log(gamma) / dt, so the same code learns
what Q-score matching learns whose gamma was set for another time step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from qsm_lightning.losses.cqsm import CQSMLoss
from qsm_lightning.networks import MLP, Critics, mish
from qsm_lightning.theory.lq import Array, LinearQuadratic, Solution

CriticKind = Literal["quadratic", "mlp"]
SECONDS = 2.0  # that a path lasts, on average
FAR = 6.0  # deviations at which it ends, as it may under a score that is not stable yet
AVERAGED = 0.25  # last share of the updates, over which what is learned is averaged


class QuadraticCritic(nn.Module):
    """Q(z) = -1/2 z'Pz + c, an ensemble of one: (x [..., n], a [..., m]) -> [1, ...]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.root = nn.Parameter(torch.zeros(size, size))
        self.c = nn.Parameter(torch.zeros(1))

    @property
    def P(self) -> Tensor:
        """[n+m, n+m], symmetric."""
        return self.root + self.root.T

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        z = torch.cat([x, a], -1)
        return (self.c - 0.5 * ((z @ self.P) * z).sum(-1))[None]


@dataclass(frozen=True)
class Errors:
    """How far what was learned is from a closed form, as shares.

    Attributes:
        P: of the greatest entry of P, in any; nan without a P.
        q: root mean square of the difference in Q over that of Q, where z is in the long run.
        score: the same of the score.
        q_mean: mean Q where z is in the long run, over that of the closed form.
    """

    P: float
    q: float
    score: float
    q_mean: float


@dataclass(frozen=True)
class Learned:
    """A critic and a score in place of the closed form's :class:`Solution`, of a float64 :class:`CQSMLoss`."""

    loss: CQSMLoss

    def errors(self, problem: LinearQuadratic, exact: Solution, points: int = 20_000) -> Errors:
        """Against ``exact``, at points drawn from where the best score leaves z in the long run."""
        covariance = _long_run(problem)
        z = np.random.default_rng(0).multivariate_normal(np.zeros(len(covariance)), covariance, points)
        with torch.no_grad():
            at = torch.from_numpy(z)
            q = self.loss.critics(*self.loss.split(at)).mean(0).numpy()
            score = self.loss.velocity(at).numpy()
        P = getattr(self.loss.critics, "P", None)
        return Errors(
            float("nan") if P is None else _largest(P.detach().numpy() - exact.P, exact.P),
            _relative(q, exact.value(z)),
            _relative(score, exact.score(z)),
            float(q.mean() / exact.value(z).mean()),
        )


def _long_run(problem: LinearQuadratic) -> Array:
    """The covariance [n+m, n+m] that the best score leaves z with."""
    return problem.stationary(problem.optimal().K)


def _largest(difference: Array, exact: Array) -> float:
    return float(np.abs(difference).max() / np.abs(exact).max())


def _relative(found: Array, exact: Array) -> float:
    return float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)))


def errors_of(problem: LinearQuadratic, found: Solution, exact: Solution) -> Errors:
    """The errors of one closed form against another, without drawing points."""
    S = _long_run(problem)
    difference, whole = _q_square(found.P - exact.P, found.c - exact.c, S), _q_square(exact.P, exact.c, S)
    score = [float(np.trace(K @ S @ K.T)) for K in (found.K - exact.K, exact.K)]
    mean = [solution.c - 0.5 * float(np.trace(solution.P @ S)) for solution in (found, exact)]
    return Errors(
        _largest(found.P - exact.P, exact.P),
        math.sqrt(difference / whole),
        math.sqrt(score[0] / score[1]),
        mean[0] / mean[1],
    )


def _q_square(P: Array, c: float, S: Array) -> float:
    """The mean of (c - 1/2 z'Pz)^2 for z of mean 0 and covariance S."""
    mean = c - 0.5 * float(np.trace(P @ S))
    return mean**2 + 0.5 * float(np.trace(P @ S @ P @ S))


def learn(
    problem: LinearQuadratic,
    dt: float,
    *,
    beta: float | None = None,
    critic: CriticKind = "quadratic",
    updates: int = 3000,
    particles: int = 512,
    learning_rate: float = 0.005,
    seed: int = 0,
) -> Learned:
    """Critic and score from frames of the score that is learned, an update for every step of ``particles`` paths.

    The loss is told of the problem by frames: z, Psi, what it was paid, dt and the next z. They begin where the best
    score leaves z in the long run. Each z is left twice, as a simulator can, with opposite noise, which takes away most
    of the variance of a temporal difference and leaves its mean. The quadratic critic has a linear score beside it, the
    MLP another MLP. Torch's global generators are left as they were.

    Args:
        problem: simulated in steps of ``dt``.
        dt: length of a step.
        beta: discount rate that is learned with, the problem's by default.
        critic: ``quadratic``, or an ``mlp`` that knows nothing of the form of Q.
        updates: their number; over the last quarter what is learned is averaged.
        particles: paths side by side, from points where z is in the long run.
        learning_rate: of Adam, at first; it falls to 0 along a cosine.
        seed: of noise and networks.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loss = _loss(problem, problem.beta if beta is None else beta, critic)
        frames = _Paths(problem, dt, particles)
        optimizers = [torch.optim.Adam(loss.term_parameters(term), learning_rate) for term in loss.terms]
        schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates) for optimizer in optimizers]
        learned = nn.ModuleList([loss.critics, loss.score])
        average = torch.optim.swa_utils.AveragedModel(learned)
        for update in range(updates):
            batch = frames.step(loss)
            for term, optimizer in zip(loss.terms, optimizers, strict=True):
                optimizer.zero_grad()
                loss.term_loss(term, batch)[0].backward()
                optimizer.step()
            loss.update_targets()
            for schedule in schedules:
                schedule.step()
            if update >= int((1 - AVERAGED) * updates):
                average.update_parameters(learned)
        learned.load_state_dict(average.module.state_dict())
    return Learned(loss)


def _loss(problem: LinearQuadratic, beta: float, critic: CriticKind) -> CQSMLoss:
    n, m = problem.B.shape
    critics: nn.Module = QuadraticCritic(n + m) if critic == "quadratic" else Critics(n, m, (64, 64), 1)
    score: nn.Module = nn.Linear(n + m, m, bias=False) if critic == "quadratic" else MLP([n + m, 64, 64, m], mish)
    if isinstance(score, nn.Linear):
        nn.init.zeros_(score.weight)  # a random one may not be stable
    settings = {"regularization": problem.regularization, "discount_rate": beta}
    return CQSMLoss(score, critics, m, **settings, tau=1.0, max_speed=None).double()  # type: ignore[arg-type]


class _Paths:
    """Euler-Maruyama paths of the score under training, a step at a time; a path lasts for two seconds on average."""

    def __init__(self, problem: LinearQuadratic, dt: float, count: int) -> None:
        tensors = (problem.F, problem.Sigma, problem.M, problem.G)
        self.F, self.Sigma, self.M, self.G = (torch.from_numpy(matrix) for matrix in tensors)
        self.dt, self.count = dt, count
        self.root = torch.from_numpy(np.linalg.cholesky(_long_run(problem)))
        self.z = self._starts()

    def _starts(self) -> Tensor:
        """Points [count, n+m] where the best score leaves z in the long run."""
        return torch.randn(self.count, len(self.root), dtype=self.root.dtype) @ self.root.T

    @torch.no_grad()
    def step(self, loss: CQSMLoss) -> TensorDict:
        """Frames [2 count]: z' = z + (F z + G Psi) dt +- Sigma sqrt(dt) w, and the reward rate of z times dt."""
        z = self.z.repeat(2, 1)
        psi = loss.velocity(z)
        noise = math.sqrt(self.dt) * torch.randn(self.count, self.Sigma.shape[1], dtype=z.dtype) @ self.Sigma.T
        after = z + (z @ self.F.T + psi @ self.G.T) * self.dt + torch.cat([noise, -noise])
        going_on = after[: self.count]
        over = torch.rand(self.count, 1) < self.dt / SECONDS
        over |= (going_on.abs() > FAR * self.root.norm(dim=1)).any(1, keepdim=True)
        self.z = torch.where(over, self._starts(), going_on)
        size = [2 * self.count]
        following = {
            "observation": after,
            "reward": (-0.5 * ((z @ self.M) * z).sum(-1) * self.dt)[:, None],
            "terminated": torch.zeros(*size, 1, dtype=torch.bool),
            "time_step": torch.full((*size, 1), self.dt, dtype=z.dtype),
        }
        return TensorDict({"observation": z, "action": psi, "next": TensorDict(following, size)}, size)
