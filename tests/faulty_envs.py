"""An environment with faults on order: ``tests.faulty_envs:Faulty-v0`` works until :func:`plan` says, and then fails.

Orders are files in the working folder, each for one fault. Whoever meets one takes it away, so that an environment
built anew, in this process or a later one, works once all have been met.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from qsm_lightning.seeding import Purpose, derive_seed

NAME = "tests.faulty_envs:Faulty-v0"
LENGTH = 7  # steps of an episode; odd ones terminate and even ones are truncated
AGE, EPISODE, LIFE, NOISE = range(4)  # columns of the observation
LIVES = "lives"  # a file with a line for each environment ever made: its process
EVALUATION_SEED = derive_seed(0, 0, Purpose.EVAL_ENV)  # of the evaluation's first environment, in a run with seed 0

Fault = Literal["raise", "NaN", "inf", "shape", "hang", "spin", "kill"]
At = Literal["step", "reset"]
Where = Literal["training", "evaluation", "video"]


def plan(
    folder: Path,
    fault: Fault,
    age: int,
    times: int = 1,
    at: At = "step",
    where: Where = "training",
    rank: int | str = "any",
) -> None:
    """Order a fault in a run that works in ``folder``.

    Args:
        folder: the run's working folder.
        fault: what happens; ``kill`` is the end of the environment's process.
        age: in which step of an environment's life, or in a reset after so many.
        times: how many environments it happens to, one after the other.
        at: whether a step or a reset fails.
        where: what the environment is used for.
        rank: the rank to which it happens, of a run of several processes.
    """
    for i in range(times):
        (folder / f"{where}.{at}.{age}.{fault}.{rank}.{i}").touch()


class Faulty(gym.Env):
    """Its observation shows where a frame belongs: steps and episodes of the environment's life, which life, noise.

    The reward is the action.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.where = "video" if render_mode else "training"
        self.age = self.episode = 0
        with Path(LIVES).open("a") as file:
            print(os.getpid(), file=file)
        self.life = len(Path(LIVES).read_text().splitlines())

    def _fault(self, at: str) -> str | None:
        """The fault ordered for this moment, as far as it does not happen here."""
        for order in sorted(Path().glob(f"{self.where}.{at}.{self.age}.*")):
            if order.name.split(".")[4] not in ("any", os.environ.get("RANK")):
                continue
            try:
                order.unlink()
            except FileNotFoundError:  # an environment in another process took it
                continue
            fault = order.name.split(".")[3]
            if fault == "raise":
                raise ValueError("the robot\nfell over")
            if fault == "hang":
                time.sleep(600)
            while fault == "spin":
                pass
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            return fault
        return None

    def _observation(self, fault: str | None) -> np.ndarray:
        place = [self.age, self.episode, self.life]
        if self.where != "training":
            place = [self.steps, 0, 0]  # an evaluation is the same whatever the environment did before
        observation = np.array([*place, self.np_random.normal()], np.float64)
        if fault == "NaN":
            observation[NOISE] = np.nan
        return np.append(observation, 0.0) if fault == "shape" else observation

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed == EVALUATION_SEED:
            self.where = "evaluation"
        self.steps = 0
        fault = self._fault("reset")
        self.episode += 1
        return self._observation(fault), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.age += 1
        self.steps += 1
        fault = self._fault("step")
        reward = {"inf": float("inf"), "huge": 1e39}.get(fault or "", float(action[0]))
        end, odd = self.steps == LENGTH, self.episode % 2 == 1
        return self._observation(fault), reward, end and odd, end and not odd, {}

    def render(self) -> np.ndarray:  # type: ignore[override]
        return np.zeros((64, 64, 3), np.uint8)


gym.register("Faulty-v0", entry_point=f"{__name__}:Faulty")
