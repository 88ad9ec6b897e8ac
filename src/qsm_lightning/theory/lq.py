r"""Continuous-time Q-score matching (Hua, Gu and Tang, NeurIPS 2025, arXiv 2510.17122) with a closed form.

State and action move together as :math:`z = (x, a)`, and the score :math:`\Psi` is what is chosen:

.. math:: dz = (F z + G \Psi)\, dt + \Sigma\, dW

The reward rate is :math:`-\frac12 z' M z - \frac\lambda2 |\Psi|^2`, discounted by :math:`e^{-\beta t}`. A linear score
:math:`\Psi = -K z` is then worth :math:`Q(z) = -\frac12 z' P z + c`, and so is the best score there is.
Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_ivp
from scipy.linalg import block_diag, solve_continuous_are, solve_continuous_lyapunov

from qsm_lightning.errors import require, require_positive

Array = NDArray[np.float64]
TOLERANCES = {"rtol": 1e-11, "atol": 1e-12}  # of the finite horizon's differential equation


class Solution(NamedTuple):
    """A linear score -K z, and the quadratic -1/2 z'Pz + c: its value, or the optimal Q.

    ``P`` is [n+m, n+m], ``c`` a number and ``K`` [m, n+m].
    """

    P: Array
    c: float
    K: Array

    def value(self, z: Array) -> Array:
        """Q at the points ``z`` [..., n+m]: [...]."""
        return self.c - _half_square(z, self.P)

    def score(self, z: Array) -> Array:
        """Psi at the points ``z`` [..., n+m]: [..., m]."""
        return -z @ self.K.T


@dataclass(frozen=True, eq=False)
class LinearQuadratic:
    r"""A linear system with a quadratic reward; n is the size of the state x, and m that of the action a.

    The state follows :math:`dx = (A x + B a)\, dt + C\, dW` and the action :math:`da = \Psi\, dt + \sigma_a\, dW`.

    Args:
        A: [n, n].
        B: [n, m].
        C: noise of the state, [n, k].
        sigma_a: noise of the action, [m, m], or a number for a multiple of the identity.
        M: cost of z = (x, a), [n+m, n+m], symmetric, with no negative eigenvalue.
        regularization: lambda, the cost of the score, above 0.
        beta: discount rate, per unit of time, above 0. A finite horizon has no discount.

    Raises:
        SettingError: for a wrong shape, or a value outside its range.
    """

    A: Array
    B: Array
    C: Array
    sigma_a: Array | float
    M: Array
    regularization: float
    beta: float

    def __post_init__(self) -> None:
        require_positive(regularization=self.regularization, beta=self.beta)
        require(np.ndim(self.B) == 2, f"B has the shape {np.shape(self.B)}: give a matrix, [n, m]")
        require(np.ndim(self.C) == 2, f"C has the shape {np.shape(self.C)}: give a matrix, [n, k]")
        (n, m), k = np.shape(self.B), np.shape(self.C)[1]
        if np.ndim(self.sigma_a) == 0:
            object.__setattr__(self, "sigma_a", self.sigma_a * np.eye(m))
        shapes = {"A": (n, n), "B": (n, m), "C": (n, k), "sigma_a": (m, m), "M": (n + m, n + m)}
        for name, shape in shapes.items():
            value = np.asarray(getattr(self, name), np.float64)
            require(value.shape == shape, f"{name} has the shape {value.shape}: with B {n, m} it must have {shape}")
            object.__setattr__(self, name, value)
        smallest = np.linalg.eigvalsh(self.M).min() if np.isfinite(self.M).all() else np.nan
        require(
            np.allclose(self.M, self.M.T) and smallest > -1e-10,
            "M is no cost: it must be finite and symmetric, with no negative eigenvalue",
        )

    @property
    def F(self) -> Array:
        """[[A, B], [0, 0]], the drift of z without a score."""
        n, m = self.B.shape
        return np.block([[self.A, self.B], [np.zeros((m, n + m))]])

    @property
    def G(self) -> Array:
        """[[0], [I]]: the score moves the action."""
        return np.eye(sum(self.B.shape))[:, len(self.A) :]

    @property
    def Sigma(self) -> Array:
        """The noise of z, [n+m, k+m]."""
        return block_diag(self.C, self.sigma_a)

    def closed_loop(self, K: Array) -> Array:
        """F - G K, the drift of z under the score -K z."""
        return self.F - self.G @ K

    def cost(self, K: Array) -> Array:
        """M + lambda K'K: twice the reward rate of the score -K z is -z'(M + lambda K'K)z."""
        return self.M + self.regularization * K.T @ K

    def spread(self, P: Array) -> float:
        """1/2 tr(Sigma Sigma' P): what the noise costs per unit of time."""
        return float(np.sum(self.Sigma * (P @ self.Sigma))) / 2

    def reward_rate(self, z: Array, psi: Array) -> Array:
        """-1/2 z'Mz - lambda/2 |Psi|^2 at ``z`` [..., n+m], with the scores ``psi`` [..., m] there: [...]."""
        return -_half_square(z, self.M) - self.regularization / 2 * np.sum(psi**2, -1)

    # Evaluation and improvement, for ever and with a discount.

    def evaluate(self, K: Array) -> Solution:
        """The value of the score -K z: beta P = M + lambda K'K + (F-GK)'P + P(F-GK), beta c = -1/2 tr(Sigma Sigma'P).

        Raises:
            SettingError: unless all eigenvalues of F - GK have real parts below beta/2. Its value can be infinite then.
        """
        shifted = self._shift(self.closed_loop(K))
        require(
            np.linalg.eigvals(shifted).real.max() < 0,
            f"K: under this score z grows faster than beta = {self.beta} discounts; take another K or a greater beta",
        )
        P = solve_continuous_lyapunov(shifted.T, -self.cost(K))
        return Solution(P, -self.spread(P) / self.beta, K)

    def improve(self, P: Array) -> Array:
        """K = G'P / lambda: the score grad_a Q / lambda, which is one exact round of Q-score matching."""
        return self.G.T @ P / self.regularization

    def policy_iteration(self, K0: Array, rounds: int) -> list[Solution]:
        """The score -K0 z and its value, then those after 1, ..., ``rounds`` rounds of exact Q-score matching."""
        solutions = [self.evaluate(K0)]
        for _ in range(rounds):
            solutions.append(self.evaluate(self.improve(solutions[-1].P)))
        return solutions

    def optimal(self) -> Solution:
        """The best score and its value: beta P = M + F'P + PF - PGG'P / lambda, and K = G'P / lambda.

        Raises:
            SettingError: when no score keeps the value finite.
        """
        control_cost = self.regularization * np.eye(self.B.shape[1])
        try:
            P = solve_continuous_are(self._shift(self.F), self.G, self.M, control_cost)
        except np.linalg.LinAlgError:
            P = np.full_like(self.M, np.nan)
        require(np.isfinite(P).all(), "A, B: no score keeps the value finite; take a greater beta")
        return Solution(P, -self.spread(P) / self.beta, self.improve(P))

    def _shift(self, drift: Array) -> Array:
        """The drift less beta/2, which takes the discount's place in an equation for P."""
        return drift - self.beta / 2 * np.eye(len(drift))

    def hamiltonian(self, z: Array, P: Array) -> Array:
        """max over Psi of reward rate + (Fz + G Psi)' grad Q + 1/2 tr(Sigma Sigma' Hess Q) at ``z`` [..., n+m]: [...].

        Q is -1/2 z'Pz + c, and the maximum is at Psi = G' grad Q / lambda.
        """
        gradient = -z @ P
        psi = gradient @ self.G / self.regularization
        drift = z @ self.F.T + psi @ self.G.T
        return self.reward_rate(z, psi) + np.sum(drift * gradient, -1) - self.spread(P)

    def hjb_residual(self, z: Array, P: Array, c: float) -> Array:
        """beta Q - max over Psi of [...] at ``z`` [..., n+m]: [...], 0 for the optimal Q."""
        return self.beta * (c - _half_square(z, P)) - self.hamiltonian(z, P)

    def stationary(self, K: Array) -> Array:
        """The covariance S [n+m, n+m] of z in the long run: (F-GK)S + S(F-GK)' + Sigma Sigma' = 0. The mean is 0.

        Raises:
            SettingError: unless all eigenvalues of F - GK have negative real parts.
        """
        drift = self.closed_loop(K)
        require(
            np.linalg.eigvals(drift).real.max() < 0,
            "K: z spreads for ever under this score; take one with F - GK stable",
        )
        return solve_continuous_lyapunov(drift, -self.Sigma @ self.Sigma.T)

    # A finite horizon T, without a discount, and with the reward -1/2 z'P(T)z at its end.

    def optimal_finite(self, horizon: float, terminal: Array, times: ArrayLike) -> list[Solution]:
        """The best score and its value at ``times``: -dP/dt = M + F'P + PF - PGG'P / lambda, K = G'P / lambda.

        Args:
            horizon: T.
            terminal: P(T), [n+m, n+m], symmetric.
            times: in [0, T], in any order.

        Raises:
            SettingError: for an argument outside its range.
        """
        return self._backwards(self.improve, horizon, terminal, times)

    def evaluate_finite(self, K: Array, horizon: float, terminal: Array, times: ArrayLike) -> list[Solution]:
        """The value of -K z at ``times``: -dP/dt = M + lambda K'K + (F-GK)'P + P(F-GK).

        The other arguments are those of :meth:`optimal_finite`.

        Raises:
            SettingError: for an argument outside its range.
        """
        return self._backwards(lambda P: K, horizon, terminal, times)

    def _backwards(
        self, choose: Callable[[Array], Array], horizon: float, terminal: Array, times: ArrayLike
    ) -> list[Solution]:
        """Both of the above, with K = ``choose(P)``; -dc/dt = -1/2 tr(Sigma Sigma'P) and c(T) = 0."""
        require_positive(horizon=horizon)
        left, shape = horizon - np.atleast_1d(np.asarray(times, np.float64)), self.M.shape
        inside = bool(((left >= 0) & (left <= horizon)).all())
        require(inside, f"times: one is outside the horizon; they must be in [0, {horizon}]")
        fits = np.shape(terminal) == shape and np.allclose(terminal, np.transpose(terminal))
        require(fits, f"terminal: it must be a symmetric matrix of the shape {shape}")

        def slope(_: float, y: Array) -> Array:
            P = y[:-1].reshape(shape)
            K = choose(P)
            half = P @ self.closed_loop(K)
            return np.append(self.cost(K) + half + half.T, -self.spread(P))

        path = solve_ivp(slope, (0, horizon), np.append(terminal, 0.0), "DOP853", dense_output=True, **TOLERANCES)
        require(path.success, "terminal: the value is infinite within the horizon; take a shorter one")
        solved = [(y[:-1].reshape(shape), float(y[-1])) for y in path.sol(left).T]
        return [Solution(P, c, choose(P)) for P, c in solved]


def _half_square(z: Array, P: Array) -> Array:
    """1/2 z'Pz."""
    return np.sum(z @ P * z, -1) / 2


def scalar() -> LinearQuadratic:
    """n = m = 1: a state that decays by itself and is pushed by the action."""
    return LinearQuadratic(
        A=np.array([[-0.5]]),
        B=np.array([[1.0]]),
        C=np.array([[0.5]]),
        sigma_a=np.array([[0.5]]),
        M=np.diag([1.0, 0.5]),
        regularization=0.5,
        beta=0.5,
    )


def four_dimensional() -> LinearQuadratic:
    """n = 4, m = 2: two damped oscillators, coupled by a spring, each pushed by an action. x is (places, speeds)."""
    stiffness = np.array([[2.0, -0.5], [-0.5, 1.0]])
    zeros, eye = np.zeros((2, 2)), np.eye(2)
    return LinearQuadratic(
        A=np.block([[zeros, eye], [-stiffness, -0.5 * eye]]),
        B=np.vstack([zeros, eye]),
        C=np.vstack([zeros, 0.5 * eye]),
        sigma_a=0.5 * eye,
        M=np.diag([1.0, 1.0, 0.5, 0.5, 0.5, 0.5]),
        regularization=0.5,
        beta=0.5,
    )
