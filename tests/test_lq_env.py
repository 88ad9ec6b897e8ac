"""The linear-quadratic problem as an environment: its steps, what its best score is worth, a run against the answer."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDictBase

from qsm_lightning.commands.trained import load
from qsm_lightning.envs import make_env
from qsm_lightning.losses import CQSM
from qsm_lightning.theory.lq import scalar
from qsm_lightning.theory.lq_env import LARGEST_ACTION
from tests.compare import last
from tests.conftest import Command

NAME = "continuous:qsm_lightning/LinearQuadratic-v0"
BEST = scalar().optimal()


def physical(observation: torch.Tensor) -> np.ndarray:
    """z of the problem from (x, a / 2)."""
    return observation.double().numpy() * np.array([1.0, LARGEST_ACTION])


@pytest.mark.parametrize("scale", ["1", "1/4"])
def test_a_step_is_the_problem_s(scale: str) -> None:
    """Drift and reward exactly, noise by its deviation; in steps of any length."""
    env = make_env(f"{NAME}?time_scale={scale}")
    env.set_seed(0)
    torch.manual_seed(0)
    frames = env.rollout(2000, break_when_any_done=False)
    dt = frames["next", "time_step"].double().numpy()
    x = frames["observation"].double().numpy()
    a = LARGEST_ACTION * frames["action"].double().numpy()
    assert dt[0].item() == pytest.approx(0.05 * float(Fraction(scale)))
    paid = -0.5 * (x**2 + 0.5 * a**2) * dt
    assert np.allclose(frames["next", "reward"], paid, atol=1e-6)
    noise = frames["next", "observation"].double().numpy() - x - (-0.5 * x + a) * dt
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert noise.std() == pytest.approx(0.5 * np.sqrt(dt[0].item()), rel=0.06)


def test_the_best_score_is_worth_its_closed_form() -> None:
    """From the environment's frames: what was paid, less the price of speed, plus Q where it ended, is Q on average."""
    problem, copies, steps = scalar(), 40, 160
    env = make_env(f"{NAME}?time_scale=1/2&max_speed=4&sigma=0.25", copies)
    env.set_seed(0)
    torch.manual_seed(0)

    def policy(tensordict: TensorDictBase) -> TensorDictBase:
        psi = BEST.score(physical(tensordict["observation"])) / LARGEST_ACTION  # of the environment's action
        return tensordict.set("action", torch.from_numpy(psi / 4).float())

    frames = env.rollout(steps, policy, break_when_any_done=False)
    z, dt = physical(frames["observation"]), 0.025
    speed = LARGEST_ACTION * 4 * frames["action"].double().numpy()[..., 0]
    assert np.abs(frames["action"]).max() < 1, "the bound on the speed is out of the way"
    discount = np.exp(-problem.beta * dt * np.arange(steps))
    earned = frames["next", "reward"].double().numpy()[..., 0] - 0.5 * problem.regularization * speed**2 * dt
    end = np.exp(-problem.beta * dt * steps) * BEST.value(physical(frames["next", "observation"])[:, -1])
    found = (discount * earned).sum(1) + end - BEST.value(z[:, 0])
    assert abs(found.mean()) < 4 * found.std() / np.sqrt(copies) + 0.02 * abs(BEST.value(z[:, 0]).mean())
    assert found.std() / np.sqrt(copies) < 0.1 * abs(BEST.value(z[:, 0]).mean()), "else it would say nothing"


def test_a_finite_horizon_is_worth_its_closed_form() -> None:
    """No discount, h = -x^2 / 2 at the end, paid once: what was paid less the price of speed is Q(0, z) on average."""
    problem, copies, horizon, dt = scalar(), 60, 2.0, 0.025
    env = make_env(f"{NAME}?time_scale=1/2&max_speed=4&sigma=0.25&horizon={horizon}", copies)
    env.set_seed(0)
    torch.manual_seed(0)
    steps = round(horizon / dt)
    terminal = np.diag([1.0, 0.0])
    solved = problem.optimal_finite(horizon, terminal, np.arange(steps + 1) * dt)

    def policy(tensordict: TensorDictBase) -> TensorDictBase:
        observation = tensordict["observation"]  # x, the share of the horizon that has passed, a / 2
        now = solved[round(observation[0, 1].item() * steps)]
        psi = now.score(physical(observation[:, [0, 2]])) / LARGEST_ACTION
        return tensordict.set("action", torch.from_numpy(psi / 4).float())

    frames = env.rollout(steps, policy, break_when_any_done=False)
    assert frames["next", "terminated"][:, -1].all()
    assert not frames["next", "terminated"][:, :-1].any()
    start, end = physical(frames["observation"][:, 0, [0, 2]]), physical(frames["next", "observation"][:, -1, [0, 2]])
    last_rate = physical(frames["observation"][:, -1, [0, 2]])
    paid = frames["next", "reward"].double().numpy()[..., 0]
    assert np.allclose(paid[:, -1], -0.5 * end[:, 0] ** 2 - 0.5 * ((last_rate @ problem.M) * last_rate).sum(-1) * dt)
    speed = LARGEST_ACTION * 4 * frames["action"].double().numpy()[..., 0]
    found = (paid - 0.5 * problem.regularization * speed**2 * dt).sum(1) - solved[0].value(start)
    assert abs(found.mean()) < 4 * found.std() / np.sqrt(copies) + 0.02 * abs(solved[0].value(start).mean())
    assert found.std() / np.sqrt(copies) < 0.2 * abs(solved[0].value(start).mean()), "else it would say nothing"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_learns_the_closed_form(tmp_path: Path, command: Command) -> None:
    """conf/cqsm/lq.yaml as it is shipped, with MLPs: Q and score where the best score is in the long run."""
    command("qsm-fit", "--config", "cqsm/lq", timeout=3600)
    loss = load(str(last(next(tmp_path.glob("runs/*/version_0"))).path)).module.loss
    assert isinstance(loss, CQSM)
    S = scalar().stationary(BEST.K)
    z = np.random.default_rng(0).multivariate_normal(np.zeros(2), S, 5000)
    with torch.no_grad():
        at = torch.from_numpy(z / [1.0, LARGEST_ACTION]).float()
        q = loss.critics(*loss.split(at)).mean(0).double().numpy()
        score = LARGEST_ACTION * loss.velocity(at).double().numpy()
    for found, exact, limit in ((q, BEST.value(z), 0.1), (score, BEST.score(z), 0.25)):
        assert np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)) < limit
