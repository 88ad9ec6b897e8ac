"""A :class:`LinearQuadratic` problem in time steps of dt: solved exactly, and simulated.

The Euler-Maruyama chain of z under the score -K z is z' = E z + Sigma sqrt(dt) w with E = I + (F - GK) dt, and every
step is paid the reward rate times dt.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import solve_discrete_lyapunov

from qsm_lightning.errors import SettingError, require, require_positive
from qsm_lightning.theory.lq import Array, LinearQuadratic, Solution


def discrete_evaluate(problem: LinearQuadratic, K: Array, dt: float, discount: float) -> Solution:
    """The value of -K z: P = (M + lambda K'K)dt + discount E'PE, c = discount (c - 1/2 tr(Sigma Sigma'P)dt).

    Args:
        problem: of continuous time; its beta is not looked at.
        K: [m, n+m].
        dt: length of a step.
        discount: factor per step, in (0, 1): exp(-beta dt) in continuous time, one number for every dt in a discrete
            method.

    Raises:
        SettingError: unless all eigenvalues of sqrt(discount) E are inside the unit circle.
    """
    require_positive(dt=dt)
    require(0 < discount < 1, f"discount is {discount}: it must be between 0 and 1")
    shrunk = np.sqrt(discount) * (np.eye(len(problem.M)) + problem.closed_loop(K) * dt)
    require(
        np.abs(np.linalg.eigvals(shrunk)).max() < 1,
        f"K: in steps of dt = {dt} z grows faster than discount = {discount} discounts; take a smaller dt or another K",
    )
    P = solve_discrete_lyapunov(shrunk.T, problem.cost(K) * dt)
    return Solution(P, -problem.spread(P) * dt * discount / (1 - discount), K)


def discrete_policy_iteration(
    problem: LinearQuadratic,
    dt: float,
    discount: float,
    K0: Array | None = None,
    rounds: int = 1000,
    tolerance: float = 1e-12,
) -> Solution:
    """Where K <- G'P / lambda ends, with P the value of -K z in steps of dt.

    Args:
        problem: of continuous time.
        dt: length of a step.
        discount: factor per step.
        K0: where to begin; the best K of continuous time by default.
        rounds: at most so many.
        tolerance: in the last round no entry of K changes by more.

    Raises:
        SettingError: when ``rounds`` are too few, or the value is infinite on the way.
    """
    K = problem.optimal().K if K0 is None else K0
    for _ in range(rounds):
        solution = discrete_evaluate(problem, K, dt, discount)
        K = problem.improve(solution.P)
        if np.abs(K - solution.K).max() <= tolerance:
            return solution
    raise SettingError(f"rounds is {rounds}: K still changes in steps of dt = {dt}; take more rounds or a smaller dt")


def simulate(
    problem: LinearQuadratic,
    score: Array | Callable[[Array], Array],
    z0: Array,
    dt: float,
    steps: int,
    generator: np.random.Generator,
    beta: float | None = None,
) -> tuple[Array, Array]:
    """Euler-Maruyama paths: z' = z + (F z + G Psi) dt + Sigma sqrt(dt) w.

    Args:
        problem: whose F, G, Sigma and reward rate are taken.
        score: K [m, n+m] of the score -K z, or a function from z [N, n+m] to Psi [N, m].
        z0: [N, n+m].
        dt: length of a step.
        steps: number of steps.
        generator: source of the noise.
        beta: discount rate of the return, the problem's by default; 0 for a finite horizon.

    Returns:
        The states [steps+1, N, n+m], and the return [N]: the sum of exp(-beta t) (reward rate) dt over the steps, with
        nothing for the last state.
    """
    psi = score if callable(score) else lambda z: -z @ score.T
    beta = problem.beta if beta is None else beta
    noise, F, G = np.sqrt(dt) * problem.Sigma.T, dt * problem.F.T, dt * problem.G.T
    states, returns = np.empty((steps + 1, *z0.shape)), np.zeros(len(z0))
    states[0] = z0
    for i, z in enumerate(states[:-1]):
        chosen = psi(z)
        returns += np.exp(-beta * i * dt) * problem.reward_rate(z, chosen) * dt
        states[i + 1] = z + z @ F + chosen @ G + generator.standard_normal((len(z), len(noise))) @ noise
    return states, returns
