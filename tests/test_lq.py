"""The linear-quadratic problem: its closed form against its equations, brute force, integrals and simulation."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.linalg import block_diag, expm, solve_discrete_lyapunov
from scipy.optimize import minimize

from qsm_lightning.commands import lq as lq_command
from qsm_lightning.envs import make_env
from qsm_lightning.errors import SettingError
from qsm_lightning.theory.lq import Array, LinearQuadratic, Solution, four_dimensional, scalar
from qsm_lightning.theory.lq_steps import discrete_evaluate, discrete_policy_iteration, simulate


def random_problem(seed: int) -> LinearQuadratic:
    """Another size for every seed, A stable once discounted, and costs and noises that mix everything."""
    g = np.random.default_rng(seed)
    n, m, k = 1 + seed % 3, 1 + seed % 2, 1 + seed % 4
    A = g.normal(size=(n, n))
    half = g.normal(size=(n + m, n + m))
    return LinearQuadratic(
        A=A - (np.linalg.eigvals(A).real.max() - 0.1) * np.eye(n),
        B=g.normal(size=(n, m)),
        C=g.normal(size=(n, k)),
        sigma_a=g.normal(size=(m, m)),
        M=half @ half.T,
        regularization=g.uniform(0.2, 2),
        beta=g.uniform(0.3, 1),
    )


EXAMPLES = [pytest.param(scalar(), id="scalar"), pytest.param(four_dimensional(), id="four")]
PROBLEMS = [*EXAMPLES, *(pytest.param(random_problem(seed), id=f"random{seed}") for seed in range(6))]
on_examples = pytest.mark.parametrize("problem", EXAMPLES)
on_problems = pytest.mark.parametrize("problem", PROBLEMS)


def points(problem: LinearQuadratic, count: int = 200) -> Array:
    return 2 * np.random.default_rng(1).normal(size=(count, len(problem.M)))


def zero_score(problem: LinearQuadratic) -> Array:
    return np.zeros((problem.B.shape[1], len(problem.M)))


def rate_of_change(problem: LinearQuadratic, solution: Solution, z: Array, psi: Array) -> Array:
    """Reward rate and the drift of Q(z) under Psi, entry by entry from the model's own statement."""
    n = len(problem.A)
    x, a = z[:, :n], z[:, n:]
    drift = np.hstack([x @ problem.A.T + a @ problem.B.T, psi])
    noise = block_diag(problem.C @ problem.C.T, problem.sigma_a @ np.transpose(problem.sigma_a))
    reward = -np.einsum("bi,ij,bj->b", z, problem.M, z) / 2 - problem.regularization * (psi**2).sum(1) / 2
    return reward - np.einsum("bi,ij,bj->b", drift, solution.P, z) - np.trace(noise @ solution.P) / 2


# The closed form.


@on_problems
def test_the_optimum_solves_the_hjb_equation(problem: LinearQuadratic) -> None:
    best, z = problem.optimal(), points(problem)
    residual = problem.hjb_residual(z, best.P, best.c)
    assert np.abs(residual).max() < 1e-9 * max(1, np.abs(best.value(z)).max())
    assert np.abs(problem.hjb_residual(z, 1.01 * best.P, best.c)).max() > 1e-3


@on_problems
def test_the_maximum_of_the_hjb_equation(problem: LinearQuadratic) -> None:
    """It is there at the score G'grad Q / lambda, and no other score has more. The P here is not optimal."""
    solution, z = problem.evaluate(zero_score(problem)), points(problem)
    at_most = problem.hamiltonian(z, solution.P)
    best = -z @ problem.improve(solution.P).T
    assert np.allclose(rate_of_change(problem, solution, z, best), at_most, atol=1e-9)
    for scale in (0.01, 1.0):
        other = best + scale * np.random.default_rng(2).normal(size=best.shape)
        gap = at_most - rate_of_change(problem, solution, z, other)
        assert np.allclose(gap, problem.regularization / 2 * ((other - best) ** 2).sum(1), atol=1e-8)


@on_problems
def test_a_value_satisfies_the_martingale_condition(problem: LinearQuadratic) -> None:
    """The discounted value and the rewards so far do not drift: also for a score that is not the best."""
    z, K = points(problem), problem.optimal().K
    for solution in (problem.evaluate(K), problem.evaluate(0.7 * K), problem.evaluate(zero_score(problem))):
        drift = rate_of_change(problem, solution, z, solution.score(z)) - problem.beta * solution.value(z)
        assert np.abs(drift).max() < 1e-8 * np.abs(solution.value(z)).max()


@on_problems
def test_the_optimum_is_the_value_of_its_score(problem: LinearQuadratic) -> None:
    best = problem.optimal()
    value = problem.evaluate(best.K)
    assert np.allclose(value.P, best.P, atol=1e-9)
    assert value.c == pytest.approx(best.c, abs=1e-9)


def integrated(problem: LinearQuadratic, K: Array, dt: float = 0.02, until: float = 60.0) -> Array:
    """P of the score -K z as the integral of the discounted cost along the mean path, by Simpson's rule."""
    n, size = len(problem.A), len(problem.M)
    drift = np.vstack([np.hstack([problem.A, problem.B]), -K]) - problem.beta / 2 * np.eye(size)
    assert n + len(K) == size
    cost = problem.M + problem.regularization * K.T @ K
    step, path = expm(drift * dt), np.eye(size)
    total, steps = np.zeros((size, size)), round(until / dt)
    for i in range(steps + 1):
        weight = 1 if i in (0, steps) else 4 if i % 2 else 2
        total += weight * dt / 3 * path.T @ cost @ path
        path = step @ path
    return total


@on_examples
def test_a_value_is_the_integral_of_the_discounted_cost(problem: LinearQuadratic) -> None:
    K = 0.7 * problem.optimal().K
    assert np.allclose(problem.evaluate(K).P, integrated(problem, K), atol=1e-6)


def test_a_search_over_all_linear_scores_finds_the_optimum() -> None:
    """By those integrals, for one start, without any of the closed form's equations."""
    problem, z = scalar(), np.array([1.0, -0.5])
    found = minimize(
        lambda k: z @ integrated(problem, k[None], dt=0.1, until=30) @ z,
        np.array([0.0, 1.0]),
        method="Nelder-Mead",
        options={"xatol": 1e-7, "fatol": 1e-13},
    )
    best = problem.optimal()
    assert found.fun == pytest.approx(z @ best.P @ z, abs=1e-4)
    assert found.x == pytest.approx(best.K[0], abs=2e-3)


@on_problems
def test_every_other_linear_score_is_worse_everywhere(problem: LinearQuadratic) -> None:
    best, g = problem.optimal(), np.random.default_rng(3)
    for scale in (0.01, 0.1):
        for _ in range(20):
            worse = problem.evaluate(best.K + scale * g.normal(size=best.K.shape))
            excess = np.linalg.eigvalsh(worse.P - best.P)
            assert excess.min() > -1e-10
            assert excess.max() > 1e-7
            assert worse.c < best.c


# Improvement.


@on_problems
def test_exact_score_matching_only_improves_and_ends_at_the_optimum(problem: LinearQuadratic) -> None:
    best = problem.optimal()
    rounds = problem.policy_iteration(zero_score(problem), 15)
    assert len(rounds) == 16
    for before, after in pairwise(rounds):
        assert np.linalg.eigvalsh(before.P - after.P).min() >= -1e-12 * max(1, np.abs(before.P).max())
    assert np.linalg.eigvalsh(rounds[0].P - rounds[1].P).max() > 1e-3
    assert np.allclose(rounds[-1].P, best.P, rtol=0, atol=1e-9)
    assert rounds[-1].c == pytest.approx(best.c, abs=1e-9)


@on_problems
def test_a_round_is_the_gradient_of_q(problem: LinearQuadratic) -> None:
    """The new score is grad_a Q / lambda, by finite differences of the value."""
    value, z, n = problem.evaluate(zero_score(problem)), points(problem, 20), len(problem.A)
    score = -z @ problem.improve(value.P).T
    for i in range(problem.B.shape[1]):
        e = 1e-3 * np.eye(len(problem.M))[n + i]
        gradient = (value.value(z + e) - value.value(z - e)) / 2e-3
        assert np.allclose(score[:, i], gradient / problem.regularization, atol=1e-7)


# A finite horizon.

TIMES = np.linspace(0.2, 1.8, 5)


def terminal(problem: LinearQuadratic) -> Array:
    half = np.random.default_rng(4).normal(size=problem.M.shape)
    return half @ half.T / 4


def time_derivative(solutions: list[Solution], h: float) -> Solution:
    """d/dt of P, c and K by the five-point rule, from those at -2h, -h, 0, h and 2h."""
    weights, columns = (1, -8, 0, 8, -1), zip(*solutions, strict=True)
    P, c, K = (sum(w * part for w, part in zip(weights, parts, strict=True)) / (12 * h) for parts in columns)
    return Solution(P, c, K)


@on_problems
@pytest.mark.parametrize("best", [True, False])
def test_the_finite_horizon_solves_its_equation(problem: LinearQuadratic, best: bool) -> None:
    """dQ/dt + max over Psi of [...] = 0, or [...] at the given Psi: finite differences of the solution in time."""
    z, h, K = points(problem, 50), 2e-3, 0.5 * problem.optimal().K
    for t in TIMES:
        around = [t + i * h for i in (-2, -1, 0, 1, 2)]
        if best:
            solutions = problem.optimal_finite(2.0, terminal(problem), around)
        else:
            solutions = problem.evaluate_finite(K, 2.0, terminal(problem), around)
        now = solutions[2]
        assert np.allclose(now.K, problem.improve(now.P) if best else K)
        derivative = time_derivative(solutions, h).value(z)
        rate = problem.hamiltonian(z, now.P) if best else rate_of_change(problem, now, z, now.score(z))
        assert np.abs(derivative + rate).max() < 1e-6 * max(1, np.abs(rate).max())


@on_problems
def test_the_finite_horizon_by_a_matrix_exponential(problem: LinearQuadratic) -> None:
    """Riccati's equation made linear: P(t) = Y X^-1 with (X, Y) moved by the Hamiltonian matrix."""
    end, size = terminal(problem), len(problem.M)
    moved = np.block([[problem.F, -problem.G @ problem.G.T / problem.regularization], [-problem.M, -problem.F.T]])
    for t, solution in zip(TIMES, problem.optimal_finite(2.0, end, TIMES), strict=True):
        both = expm(-moved * (2.0 - t)) @ np.vstack([np.eye(size), end])
        expected = both[size:] @ np.linalg.inv(both[:size])
        assert np.allclose(solution.P, expected, atol=1e-8 * max(1, np.abs(expected).max()))


@on_problems
def test_the_ends_of_the_finite_horizon(problem: LinearQuadratic) -> None:
    end = terminal(problem)
    last, first = problem.optimal_finite(2.0, end, [2.0, 0.0])
    assert np.allclose(last.P, end)
    assert last.c == 0
    assert first.c < 0
    given = problem.evaluate_finite(0.5 * first.K, 2.0, end, 0.0)[0]
    assert np.linalg.eigvalsh(given.P - first.P).min() > -1e-9
    assert given.c < first.c


@on_examples
def test_a_long_horizon_tends_to_no_discount(problem: LinearQuadratic) -> None:
    far = problem.optimal_finite(60.0, terminal(problem), [0.0])[0]
    assert np.allclose(far.P, replace(problem, beta=1e-9).optimal().P, atol=1e-6)


@on_examples
def test_finite_returns_agree_with_the_value(problem: LinearQuadratic) -> None:
    """Simulated, with the reward at the end; two steps are extrapolated to none, which leaves errors of dt^2."""
    K, end, dt, count = problem.optimal().K, terminal(problem), 0.005, 4000
    z0 = np.tile(points(problem, 1), (count, 1))
    states, returns = simulate(problem, K, z0, dt, 200, np.random.default_rng(5), beta=0.0)
    returns = returns - np.einsum("bi,ij,bj->b", states[-1], end, states[-1]) / 2
    coarse = simulate(problem, K, z0, 2 * dt, 100, np.random.default_rng(6), beta=0.0)
    coarse_returns = coarse[1] - np.einsum("bi,ij,bj->b", coarse[0][-1], end, coarse[0][-1]) / 2
    extrapolated = 2 * returns.mean() - coarse_returns.mean()
    error = np.sqrt((4 * returns.var() + coarse_returns.var()) / count)
    value = problem.evaluate_finite(K, 1.0, end, [0.0])[0].value(z0[0])
    assert abs(extrapolated - value) < 4 * error
    assert error < 0.05 * abs(value)


# Steps of dt.


@on_examples
def test_the_chain_by_its_own_recursion(problem: LinearQuadratic) -> None:
    """P and c of the chain by summing its rewards, step by step."""
    K, dt, discount = 0.7 * problem.optimal().K, 0.1, 0.93
    size = len(problem.M)
    step = np.eye(size) + dt * np.vstack([np.hstack([problem.A, problem.B]), -K])
    cost = (problem.M + problem.regularization * K.T @ K) * dt
    noise = problem.Sigma @ problem.Sigma.T * dt
    P, c, power, covariance = np.zeros((size, size)), 0.0, np.eye(size), np.zeros((size, size))
    for i in range(1000):
        P += discount**i * power.T @ cost @ power
        c -= discount**i * np.trace(cost @ covariance) / 2
        power, covariance = step @ power, step @ covariance @ step.T + noise
    found = discrete_evaluate(problem, K, dt, discount)
    assert np.allclose(found.P, P)
    assert found.c == pytest.approx(c)


def slope_in_dt(errors: list[Any], steps: Any) -> float:
    """Of log error against log dt: the order of convergence."""
    return float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


@on_examples
def test_the_chain_tends_to_continuous_time_at_first_order(problem: LinearQuadratic) -> None:
    best, steps = problem.optimal(), 2.0 ** -np.arange(6, 13)
    fixed = [discrete_policy_iteration(problem, dt, np.exp(-problem.beta * dt)) for dt in steps]
    given = [discrete_evaluate(problem, best.K, dt, np.exp(-problem.beta * dt)) for dt in steps]
    for solutions in (fixed, given):
        assert slope_in_dt([np.linalg.norm(s.P - best.P) for s in solutions], steps) == pytest.approx(1, abs=0.03)
        assert slope_in_dt([abs(s.c - best.c) for s in solutions], steps) == pytest.approx(1, abs=0.03)
    assert slope_in_dt([np.linalg.norm(s.K - best.K) for s in fixed], steps) == pytest.approx(1, abs=0.03)


@on_examples
def test_the_chain_ends_at_a_fixed_point_from_anywhere(problem: LinearQuadratic) -> None:
    dt, discount = 0.05, np.exp(-problem.beta * 0.05)
    found = discrete_policy_iteration(problem, dt, discount)
    other = discrete_policy_iteration(problem, dt, discount, zero_score(problem))
    assert np.allclose(found.K, problem.improve(found.P), atol=1e-11)
    assert np.allclose(found.P, other.P, atol=1e-10)
    with pytest.raises(SettingError, match="take a smaller dt"):
        discrete_policy_iteration(problem, dt, discount, -found.K)


@on_examples
def test_one_discount_for_every_step_moves_the_fixed_point(problem: LinearQuadratic) -> None:
    """It halves with dt in the end: the horizon is counted in steps. With exp(-beta dt) it stays where it is."""
    best, gamma = problem.optimal(), float(np.exp(-problem.beta * 0.05))
    norm = np.linalg.norm(best.P)
    for dt in (0.0125, 0.00625):
        stays = discrete_policy_iteration(problem, dt, np.exp(-problem.beta * dt))
        moves = discrete_policy_iteration(problem, dt, gamma)
        assert np.linalg.norm(stays.P - best.P) < 0.03 * norm
        assert np.linalg.norm(moves.P - best.P) > 0.4 * norm
    tiny = discrete_policy_iteration(problem, 1e-6, gamma)
    assert np.allclose(tiny.P / 1e-6 * (1 - gamma), problem.M, atol=1e-3)


# Simulation.


@on_examples
def test_returns_agree_with_q(problem: LinearQuadratic) -> None:
    """Of the best score: with the chain's exact value, and with Q, from which a step of 0.005 hardly takes it away."""
    best, dt, count, until = problem.optimal(), 0.005, 400, 24.0
    z0 = np.tile(points(problem, 1), (count, 1))
    _, returns = simulate(problem, best.K, z0, dt, round(until / dt), np.random.default_rng(7))
    error = returns.std() / np.sqrt(count)
    chain = discrete_evaluate(problem, best.K, dt, np.exp(-problem.beta * dt)).value(z0[0])
    q = best.value(z0[0])
    assert abs(chain - q) < error
    assert abs(returns.mean() - chain) < 4 * error
    assert abs(returns.mean() - q) < 4 * error
    assert error < 0.05 * abs(q)


@on_examples
def test_a_function_simulates_like_its_matrix(problem: LinearQuadratic) -> None:
    best, z0 = problem.optimal(), points(problem, 7)
    states, returns = simulate(problem, best.K, z0, 0.1, 5, np.random.default_rng(8))
    same = simulate(problem, best.score, z0, 0.1, 5, np.random.default_rng(8))
    assert states.shape == (6, 7, len(problem.M))
    assert np.array_equal(states[0], z0)
    assert np.array_equal(states, same[0])
    assert np.array_equal(returns, same[1])
    other = simulate(problem, lambda z: best.score(z) + 1, z0, 0.1, 5, np.random.default_rng(8))
    assert not np.allclose(states, other[0])


def test_the_return_by_hand() -> None:
    """Three steps without noise."""
    problem = replace(scalar(), C=np.zeros((1, 1)), sigma_a=0.0)
    K = z0 = np.array([[1.0, 2.0]])
    states, returns = simulate(problem, K, z0, 0.5, 3, np.random.default_rng(0))
    x, a, total = 1.0, 2.0, 0.0
    for i in range(3):
        psi = -x - 2 * a
        total += np.exp(-0.25 * i) * 0.5 * (-(x**2) / 2 - a**2 / 4 - psi**2 / 4)
        x, a = x + 0.5 * (-0.5 * x + a), a + 0.5 * psi
        assert states[i + 1, 0].tolist() == pytest.approx([x, a])
    assert returns.tolist() == pytest.approx([total])


@on_examples
def test_paths_settle_at_the_stationary_covariance(problem: LinearQuadratic) -> None:
    K, dt, count = problem.optimal().K, 0.02, 5000
    S = problem.stationary(K)
    states, _ = simulate(problem, K, np.zeros((count, len(S))), dt, 700, np.random.default_rng(9))
    sampled = states[-1].T @ states[-1] / count
    error = np.sqrt((np.outer(np.diag(S), np.diag(S)) + S**2) / count)  # of each entry, for normal z
    assert (np.abs(sampled - covariance_of_the_chain(problem, K, dt)) < 4.5 * error).all()
    away = [np.abs(covariance_of_the_chain(problem, K, step) - S).max() for step in (0.02, 0.01, 1e-4)]
    assert away[0] < 0.1 * np.abs(S).max()
    assert away[1] == pytest.approx(away[0] / 2, rel=0.1)
    assert away[2] < 1e-3 * np.abs(S).max()


def covariance_of_the_chain(problem: LinearQuadratic, K: Array, dt: float) -> Array:
    """Which the paths in steps of dt end at, exactly."""
    step = np.eye(len(problem.M)) + problem.closed_loop(K) * dt
    return solve_discrete_lyapunov(step, problem.Sigma @ problem.Sigma.T * dt)


# Bad input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0"),
        ({"regularization": -1.0}, "regularization is -1.0"),
        ({"A": np.zeros((2, 2))}, r"A has the shape \(2, 2\)"),
        ({"B": np.zeros(1)}, r"B has the shape \(1,\)"),
        ({"C": np.zeros(1)}, r"C has the shape \(1,\)"),
        ({"sigma_a": np.zeros((2, 2))}, r"sigma_a has the shape \(2, 2\)"),
        ({"M": np.eye(3)}, r"M has the shape \(3, 3\)"),
        ({"M": np.diag([1.0, -1.0])}, "M is no cost"),
        ({"M": np.array([[1.0, 0.1], [0.0, 1.0]])}, "M is no cost"),
        ({"M": np.diag([1.0, np.nan])}, "M is no cost"),
    ],
)
def test_bad_problems_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        replace(scalar(), **change)


def test_what_has_no_finite_value_is_refused() -> None:
    problem, unstable = scalar(), np.array([[0.0, -0.3]])
    with pytest.raises(SettingError, match="take another K or a greater beta"):
        problem.evaluate(unstable)
    with pytest.raises(SettingError, match="take a smaller dt or another K"):
        discrete_evaluate(problem, unstable, 0.01, np.exp(-0.005))
    with pytest.raises(SettingError, match="spreads for ever"):
        problem.stationary(np.zeros((1, 2)))
    with pytest.raises(SettingError, match="no score keeps"):
        replace(problem, A=np.array([[1.0]]), B=np.array([[0.0]])).optimal()
    with pytest.raises(SettingError, match="infinite within the horizon"):
        problem.optimal_finite(20.0, -5 * np.eye(2), [0.0])


def test_bad_arguments_are_refused() -> None:
    problem = scalar()
    best = problem.optimal()
    for times in (-0.1, [1.0, 2.1], np.nan):
        with pytest.raises(SettingError, match="outside the horizon"):
            problem.optimal_finite(2.0, np.eye(2), times)
    for end in (np.eye(3), np.array([[1.0, 1.0], [0.0, 1.0]])):
        with pytest.raises(SettingError, match="terminal: it must be"):
            problem.evaluate_finite(best.K, 2.0, end, [0.0])
    with pytest.raises(SettingError, match="horizon is 0"):
        problem.optimal_finite(0.0, np.eye(2), [0.0])
    with pytest.raises(SettingError, match="dt is 0"):
        discrete_evaluate(problem, best.K, 0.0, 0.9)
    with pytest.raises(SettingError, match="discount is 1.0"):
        discrete_evaluate(problem, best.K, 0.1, 1.0)
    with pytest.raises(SettingError, match="rounds is 2"):
        discrete_policy_iteration(problem, 0.05, 0.97, rounds=2)


def test_without_scipy_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "scipy" else find(name, *args))
    for make in (lambda: lq_command.run([]), lambda: make_env("qsm_lightning/LinearQuadratic-v0")):
        with pytest.raises(SettingError, match=r"scipy is not installed; pip install 'qsm-lightning\[theory\]'"):
            make()
