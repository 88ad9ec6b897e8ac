"""Small environments with known behaviour, made by name: ``tests.fake_envs:Clock-v0``."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np

BOX = gym.spaces.Box(-1, 1, (1,), np.float32)


class Bandit(gym.Env):
    """One step an episode; reward a^2, so that -1 and 1 are equally good."""

    observation_space = gym.spaces.Box(0, 0, (1,), np.float32)
    action_space = BOX

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.zeros(1, np.float32), float(action[0] ** 2), True, False, {}


class Start(Bandit):
    """The reward is drawn when the episode begins, whatever the action."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        out = super().reset(seed=seed)
        self.drawn = float(self.np_random.normal())
        return out

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, _, *rest = super().step(action)
        return observation, self.drawn, *rest  # type: ignore[return-value]


class Clock(gym.Env):
    """Counts its steps in the observation [step, episode]; odd episodes terminate and even ones truncate at step 5."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-2, 6, (1,), np.float32)

    def __init__(self) -> None:
        self.episode = 0

    def _observation(self) -> np.ndarray:
        return np.array([self.steps, self.episode], np.float64)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        self.episode += 1
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        end, odd = self.steps == 5, self.episode % 2 == 1
        return self._observation(), float(action[0]), end and odd, end and not odd, {}


class Wanderer(gym.Env):
    """Its future hangs on state of many kinds: arrays, scalars, a deque, a list, its generator."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = BOX

    def _observation(self) -> np.ndarray:
        return np.array([self.place[0], self.speed, sum(self.trail)], np.float64)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=1).astype(np.float32)
        self.speed = np.float32(0.1)
        self.trail: deque[float] = deque([0.5, 0.25], maxlen=3)
        self.marks: list[tuple[int, np.ndarray]] = []
        self.info = {"steps": 0}
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.info["steps"] += 1
        self.speed = np.float32(0.9) * self.speed + np.float32(action[0]) * np.float32(0.1)
        self.place = self.place + self.speed + self.np_random.normal(size=1).astype(np.float32)
        self.trail.append(float(self.place[0]))
        self.marks.append((self.info["steps"], self.place))
        oldest = self.marks[0][1][0]
        return self._observation(), float(oldest), bool(abs(self.place[0]) > 4), self.info["steps"] >= 9, {}


class Own(Wanderer):
    """Keeps part of its state out of sight, and tells it itself."""

    def __init__(self) -> None:
        self.hidden = SimpleNamespace(count=0)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.hidden.count += 1
        observation, reward, *rest = super().step(action)
        return observation, reward + self.hidden.count, *rest  # type: ignore[return-value]

    def state_dict(self) -> dict[str, Any]:
        kept = {k: v for k, v in vars(self).items() if k not in ("hidden", "spec", "_np_random")}
        return {"count": self.hidden.count, "kept": kept, "random": self.np_random.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.hidden.count = state["count"]
        vars(self).update(state["kept"])
        self.np_random.bit_generator.state = state["random"]


class Secret(Bandit):
    """Keeps something of unknown kind."""

    def __init__(self) -> None:
        self.secret = object()


class Faulty(Bandit):
    """Returns NaN as ``what`` from its 50th step on."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.count = 0

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, *rest = super().step(action)
        self.count += 1
        if self.count >= 50:
            observation = observation + np.nan if self.what == "observation" else observation
            reward = float("inf") if self.what == "reward" else reward
        return observation, reward, *rest  # type: ignore[return-value]


class Lists(Bandit):
    """Gives its observations as lists, though its space says arrays."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = super().reset(**kwargs)
        return observation.tolist(), info

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, *rest = super().step(action)
        return observation.tolist(), *rest  # type: ignore[return-value]


class Overflow(Bandit):
    """A reward that a squared error cannot hold, from its 80th step on."""

    def __init__(self) -> None:
        self.count = 0

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        observation, _, *rest = super().step(action)
        return observation, 1e38 if self.count >= 80 else 0.0, *rest  # type: ignore[return-value]


class Parts(Bandit):
    """A dictionary observation with parts named out of order."""

    observation_space = gym.spaces.Dict(  # type: ignore[assignment]
        {"b": gym.spaces.Box(-9, 9, (2, 2), np.float64), "a": gym.spaces.Box(-9, 9, (1,), np.float64)}
    )

    def _parts(self) -> dict[str, np.ndarray]:
        return {"b": np.arange(1.0, 5.0).reshape(2, 2), "a": np.zeros(1)}

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**kwargs)
        return self._parts(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._parts(), 0.0, True, False, {}


class Unbounded(Bandit):
    """Actions without bounds."""

    action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)


class Stuck(Bandit):
    """A component of its actions has one value alone."""

    action_space = gym.spaces.Box(np.array([0, 1], np.float32), np.ones(2, np.float32))


class Whole(Bandit):
    """Actions of whole numbers."""

    action_space = gym.spaces.Box(-2, 2, (2,), np.int64)  # type: ignore[arg-type]


class Still(Bandit):
    """No actions."""

    action_space = gym.spaces.Box(-1, 1, (0,), np.float32)


class Matrix(Bandit):
    """Actions that are not a vector."""

    action_space = gym.spaces.Box(-1, 1, (2, 3), np.float32)


class Words(Bandit):
    """Observations of any length."""

    observation_space = gym.spaces.Sequence(gym.spaces.Box(-1, 1, (2,), np.float32))  # type: ignore[assignment]


for name in (
    "Bandit",
    "Start",
    "Clock",
    "Wanderer",
    "Own",
    "Secret",
    "Lists",
    "Overflow",
    "Parts",
    "Unbounded",
    "Stuck",
    "Whole",
    "Still",
    "Matrix",
    "Words",
):
    gym.register(f"{name}-v0", entry_point=f"{__name__}:{name}")
for what in ("observation", "reward"):
    gym.register(f"Faulty{what.title()}-v0", entry_point=f"{__name__}:Faulty", kwargs={"what": what})
