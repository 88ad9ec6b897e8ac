"""A toy with two optimal first actions, after figure 4 of arXiv 2312.11752: ``qsm_lightning/TwoGoals-v0``."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

SPEED = 2.0  # way of one step by the action 1
EDGE = 3.0
EPISODE_FRAMES = 5


class TwoGoals(gym.Env):
    r"""A point on a line, half way between a goal at -1 and one at 1.

    Its position begins at x = 0 and goes to x' = clip(x + 2 a, -3, 3) by the action a in [-1, 1]; [x] is observed. The
    reward is minus the squared distance to the nearer goal, -(\|x'\| - 1)^2. An episode is truncated after 5 steps and
    never terminates.

    From anywhere a goal is one step away. So the greatest return is 0, and an action that the best ones follow is worth
    its own reward, Q*(x, a) = -(\|x'\| - 1)^2. At the start two actions have all of it, -1/2 and 1/2, and nothing tells
    them apart: mirroring positions and actions changes no reward. Their mean, 0, goes nowhere, for a return of -5. The
    bounds, where a wide tanh-Gaussian would have two peaks, are as bad: they go to -2 and 2.
    """

    observation_space = gym.spaces.Box(-EDGE, EDGE, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self) -> None:
        self.position = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.position = 0.0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.position = min(max(self.position + SPEED * float(action[0]), -EDGE), EDGE)
        return self._observation(), -((abs(self.position) - 1) ** 2), False, False, {}

    def _observation(self) -> np.ndarray:
        return np.array([self.position], np.float32)


gym.register("qsm_lightning/TwoGoals-v0", f"{__name__}:TwoGoals", max_episode_steps=EPISODE_FRAMES)
