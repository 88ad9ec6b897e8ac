r"""Environments in continuous time: ``continuous:NAME?time_scale=1/4&max_speed=20``.

Each frame then carries the time it took, ``("next", "time_step")`` in seconds, and three things can be asked for that
continuous-time Q-score matching (arXiv 2510.17122) is about: another time step, an action that moves instead of
jumping, and a horizon.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.mujoco import MujocoEnv
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase, Transform

from qsm_lightning.errors import SettingError, require

CONTINUOUS = "continuous"
LEAST, MOST = 1e-6, 1e6  # of options
TIME_STEP = "time_step"
TERMINAL_REWARD = "terminal_reward"
STATE, VELOCITY = "continuous_state", "continuous_velocity"  # what a policy saw and gave, while the environment steps


@dataclass(frozen=True)
class ContinuousTime:
    """What follows the ``?`` in the name of an environment in continuous time.

    Args:
        env: the environment's own name.
        time_scale: its control step as a share of the usual one, such as 1/4: four times as many steps, each with a
            quarter of the reward, so that a return does not depend on it. All of a reward is taken as a rate.
        jitter: each step is longer or shorter by up to this share, uniformly, in [0, 1).
        max_speed: greatest speed of the action, per second. The policy's output in [-1, 1] is then a velocity, and the
            action, at first 0, part of what is observed: da = max_speed u dt + sigma dW. By default actions jump.
        sigma: deviation of that noise after one second.
        horizon: seconds after which an episode is terminated, at the nearest step; the share that has passed is
            observed, and the environment's own limit of steps is lifted. What its end is worth, h, an environment says
            by a method ``terminal_reward()``; it is paid with the last step.
    """

    env: str
    time_scale: float = 1.0
    jitter: float = 0.0
    max_speed: float | None = None
    sigma: float = 0.0
    horizon: float | None = None

    @classmethod
    def parse(cls, name: str) -> ContinuousTime:
        """From what follows ``continuous:``.

        Raises:
            SettingError: for an option that there is not, or a value out of range.
        """
        env, _, query = name.partition("?")
        known = [field.name for field in fields(cls)[1:]]
        options: dict[str, Any] = {}
        for part in filter(None, query.split("&")):
            key, _, value = part.partition("=")
            require(key in known, f"data.env has {part!r}: give {', '.join(known)}, such as time_scale=1/4")
            try:
                options[key] = float(value) if "e" in value.lower() else float(Fraction(value.strip()))
            except (ValueError, ZeroDivisionError, OverflowError) as error:
                raise SettingError(f"data.env has {part!r}: {value!r} is not a number such as 0.25 or 1/4") from error
        time = cls(env, **options)
        for key in ("time_scale", "max_speed", "horizon"):
            value = getattr(time, key)
            require(
                value is None or LEAST <= value <= MOST,
                f"data.env has {key}={value}: it must be a number from {LEAST:g} to {MOST:g}",
            )
        require(0 <= time.jitter < 1, f"data.env has jitter={time.jitter}: it must be at least 0 and below 1")
        require(0 <= time.sigma <= MOST, f"data.env has sigma={time.sigma}: it must be from 0 to {MOST:g}")
        require(
            time.sigma == 0 or time.max_speed is not None,
            f"data.env has sigma={time.sigma}: it is the noise of an action that moves; give max_speed as well",
        )
        return time

    @property
    def output(self) -> str:
        """What a policy's output is in the environment; empty where it is the action itself."""
        if self.max_speed is None:
            return ""
        return (
            "a velocity: the action, which is the end of the observation, goes to "
            f"clip(action + {self.max_speed:g} output dt, -1, 1)"
        )

    @property
    def keeps_the_step(self) -> bool:
        """Whether the environment's own time step is left as it is."""
        return self.time_scale == 1 and self.jitter == 0


class Clock:
    """An environment's control step: read, and set where that is asked for.

    Args:
        name: what messages call the environment.
        env: gymnasium's or dm_control's own.
        time: what is asked for.

    Raises:
        SettingError: when it does not tell its time step, or cannot take the one asked for.
    """

    def __init__(self, name: str, env: Any, time: ContinuousTime) -> None:
        self.env: Any = env
        self.time = time
        self._of_gymnasium = isinstance(env, gym.Env)
        self.least = 0.0  # what a step is a whole number of, in seconds
        if isinstance(env, MujocoEnv):
            self.least = env.model.opt.timestep
        elif self._of_gymnasium:
            told = getattr(env, "dt", None)
            require(
                isinstance(told, (int, float)) and told > 0,
                f"data.env is {name!r}: it does not tell its time step; give it an attribute dt, in seconds",
            )
        else:
            self.least = env.physics.timestep()
        self.usual = self.step
        if self.least:
            wanted = time.time_scale * self.usual / self.least
            require(
                abs(wanted - round(wanted)) < 1e-6 and round(wanted) > 0,
                f"data.env is {name!r}: with time_scale={time.time_scale:g} a step is {wanted:g} steps of the "
                f"simulator; give a multiple of 1/{round(self.usual / self.least)}",
            )
            require(
                time.jitter == 0 or (time.jitter * wanted >= 1 and (1 - time.jitter) * wanted >= 0.5),
                f"data.env is {name!r}: a step is {wanted:g} of the simulator, which jitter={time.jitter:g} cannot "
                "make longer and shorter; give another, or a greater time_scale",
            )
        if not time.keeps_the_step:
            try:
                self.step = time.time_scale * self.usual
            except AttributeError as error:
                raise SettingError(
                    f"data.env is {name!r}: its time step cannot be set; leave out time_scale and jitter"
                ) from error

    @property
    def step(self) -> float:
        """Seconds."""
        return float(self.env.dt if self._of_gymnasium else self.env.control_timestep())

    @step.setter
    def step(self, seconds: float) -> None:
        count = max(1, round(seconds / self.least)) if self.least else 0
        if isinstance(self.env, MujocoEnv):
            self.env.frame_skip = count
        elif self._of_gymnasium:
            self.env.dt = seconds
        else:
            self.env._n_sub_steps = count

    def tick(self, generator: np.random.Generator | np.random.RandomState) -> None:
        """Draw the length of the next step."""
        if self.time.jitter:
            factor = 1 + self.time.jitter * generator.uniform(-1, 1)
            self.step = factor * self.time.time_scale * self.usual

    def limit(self, steps: float) -> float:
        """An episode's limit of ``steps`` usual steps in steps of today, or one that is out of a horizon's way."""
        if self.time.horizon is not None:
            return math.ceil(self.time.horizon / (self.time.time_scale * self.usual * (1 - self.time.jitter))) + 1
        return math.ceil(steps / self.time.time_scale - 1e-9) if math.isfinite(steps) else steps

    @property
    def share(self) -> float:
        """The present step as a share of the usual one; 1 of an environment that sets its own."""
        return 1.0 if self.time.keeps_the_step else self.step / self.usual


class Timed:
    """Mixin for a TorchRL environment whose frames carry their time step, after :meth:`keep_time`."""

    observation_spec: Composite
    clock: Clock
    _env: Any  # gymnasium's or dm_control's own
    _random: Callable[[], Any]
    _at_end: Callable[[], float] | None

    def keep_time(self, clock: Clock, random: Callable[[], Any]) -> None:
        """Begin to.

        Args:
            clock: of the environment within.
            random: gives the environment's generator.
        """
        self.clock, self._random = clock, random
        spec = self.observation_spec.clone()
        spec[TIME_STEP] = Unbounded((1,))
        self._at_end = getattr(clock.env, TERMINAL_REWARD, None) if clock.time.horizon is not None else None
        if self._at_end is not None:
            spec[TERMINAL_REWARD] = Unbounded((1,))
        self.observation_spec = spec

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.clock.tick(self._random())
        out = super()._step(tensordict)  # type: ignore[misc]
        share = self.clock.share
        if share != 1:
            out["reward"] = out["reward"] * share
        return self._told(out, self.clock.step)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        return self._told(super()._reset(tensordict, **kwargs), 0.0)  # type: ignore[misc]

    def _told(self, out: TensorDictBase, step: float) -> TensorDictBase:
        if self._at_end is not None:
            out[TERMINAL_REWARD] = torch.tensor([self._at_end()], dtype=torch.float32)
        return out.set(TIME_STEP, torch.tensor([step], dtype=torch.float32))


def time_gym(env: Timed, name: str, time: ContinuousTime) -> None:
    """Have a gymnasium environment keep the time asked for; a limit of its episodes stays the same in seconds."""
    raw, inner = env._env, env._env.unwrapped
    clock = Clock(name, inner, time)
    env.keep_time(clock, lambda: inner.np_random)
    while isinstance(raw, gym.Wrapper):
        if isinstance(raw, gym.wrappers.TimeLimit):
            raw._max_episode_steps = int(clock.limit(raw._max_episode_steps))
        raw = raw.env


def time_dm_control(env: Timed, name: str, time: ContinuousTime) -> None:
    """As :func:`time_gym`."""
    control = env._env
    clock = Clock(name, control, time)
    env.keep_time(clock, lambda: control.task.random)
    control._step_limit = clock.limit(control._step_limit)


class MovingAction(Transform):
    r"""The action as a state that the policy moves, da = max_speed u dt + sigma dW, and the horizon.

    The policy's output u [A] in [-1, 1] is called ``action``, as everywhere. The environment takes a step with the
    action a [A] that is there; after it, a' = clip(a + max_speed u dt + sigma sqrt(dt) z, -1, 1). Observed is (x, the
    share of the horizon that has passed, a), without what was not asked for.

    Args:
        time: what is asked for.
        action_dim: A.
    """

    def __init__(self, time: ContinuousTime, action_dim: int) -> None:
        super().__init__(in_keys=["observation"], out_keys=["observation"])
        self.time = time
        self.moved = action_dim if time.max_speed is not None else 0
        self.extra = self.moved + (time.horizon is not None)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        spec = observation_spec.clone()
        shape = spec["observation"].shape
        spec["observation"] = Unbounded((*shape[:-1], shape[-1] + self.extra), dtype=spec["observation"].dtype)
        return spec

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        observation = tensordict_reset["observation"]
        start = observation.new_zeros(*observation.shape[:-1], self.extra)
        return tensordict_reset.set("observation", torch.cat([observation, start], -1))

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The environment's own observation and action; the others under keys that no environment has.

        Of copies that rest, as their episode is over and those of others are not, a step gives back what stood there.
        """
        state = tensordict["observation"]
        tensordict[STATE] = state
        tensordict["observation"] = state[..., : state.shape[-1] - self.extra]
        if self.moved:
            tensordict[VELOCITY] = tensordict["action"]
            tensordict["action"] = state[..., -self.moved :]
        return tensordict

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        state, time_step = tensordict[STATE], next_tensordict[TIME_STEP]
        parts = [next_tensordict["observation"]]
        if self.time.horizon is not None:
            place = state.shape[-1] - self.extra
            passed = state[..., place : place + 1] + time_step / self.time.horizon
            parts.append(passed)
            self._end(next_tensordict, passed > 1 - 0.5 * time_step / self.time.horizon)  # the nearest step
        if self.time.max_speed is not None:
            velocity = self.time.max_speed * tensordict[VELOCITY]
            parts.append(moved(state[..., -self.moved :], velocity, time_step, self.time.sigma))
        return next_tensordict.set("observation", torch.cat(parts, -1))

    @staticmethod
    def _end(following: TensorDictBase, over: Tensor) -> None:
        if TERMINAL_REWARD in following:
            following["reward"] = following["reward"] + over * following[TERMINAL_REWARD]
        following["terminated"] = following["terminated"] | over
        following["done"] = following["done"] | over
        following["truncated"] = following["truncated"] & ~following["terminated"]


def moved(action: Tensor, velocity: Tensor, time_step: Tensor, sigma: float = 0.0) -> Tensor:
    """a' = clip(a + Psi dt + sigma sqrt(dt) z, -1, 1), the Euler-Maruyama step of da = Psi dt + sigma dW.

    Args:
        action: a, [..., A].
        velocity: Psi, [..., A].
        time_step: dt, [..., 1].
        sigma: deviation of the noise after one second.
    """
    after = action + velocity * time_step
    if sigma > 0:
        after = after + sigma * time_step.sqrt() * torch.randn_like(after)
    return after.clamp(-1, 1)


def moving_action(env: EnvBase) -> MovingAction | None:
    """The transform in an environment of :func:`qsm_lightning.envs.make_env`, if its actions move."""
    for transform in getattr(env, "transform", ()):
        if isinstance(transform, MovingAction) and transform.moved:
            return transform
    return None
