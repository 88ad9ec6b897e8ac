"""A linear-quadratic problem as an environment, ``qsm_lightning/LinearQuadratic-v0``, for runs with a known answer."""

from __future__ import annotations

import importlib
from typing import Any

import gymnasium as gym
import numpy as np

from qsm_lightning.errors import require_package

USUAL_STEP = 0.05  # seconds
EPISODE_SECONDS = 10.0
LARGEST_ACTION = 2.0  # six deviations of the best action


class ScalarLinearQuadratic(gym.Env):
    r""":func:`qsm_lightning.theory.lq.scalar`: dx = (A x + B a) dt + C dW, paid -1/2 z'Mz per second.

    The action is a / 2, in [-1, 1], and held for a step; [x] is observed. An episode begins where the best score leaves
    x in the long run and is truncated after 10 seconds; the end of a finite horizon is worth -x^2 / 2. The reward of a
    step of the usual length, 0.05 seconds, is the rate times that; :class:`~qsm_lightning.continuous.Clock` sets ``dt``
    and scales it.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self) -> None:
        require_package("scipy", "theory", "data.env is LinearQuadratic-v0")
        problem = importlib.import_module("qsm_lightning.theory.lq").scalar()
        self.dt = USUAL_STEP
        self.x = 0.0
        self._drift = np.array([problem.A.item(), problem.B.item()])
        self._noise = problem.C.item()
        self._M = problem.M
        self._start = float(np.sqrt(problem.stationary(problem.optimal().K)[0, 0]))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.x = self._start * self.np_random.standard_normal()
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        z = np.array([self.x, LARGEST_ACTION * float(action[0])])
        noise = self._noise * np.sqrt(self.dt) * self.np_random.standard_normal()
        self.x = float(self.x + self._drift @ z * self.dt + noise)
        return self._observation(), float(-0.5 * z @ self._M @ z) * USUAL_STEP, False, False, {}

    def terminal_reward(self) -> float:
        """h = -x^2 / 2, for a finite horizon."""
        return -0.5 * self.x**2

    def _observation(self) -> np.ndarray:
        return np.array([self.x], np.float32)


gym.register(
    "qsm_lightning/LinearQuadratic-v0",
    f"{__name__}:ScalarLinearQuadratic",
    max_episode_steps=round(EPISODE_SECONDS / USUAL_STEP),
)
