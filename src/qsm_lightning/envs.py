"""Environments by name: gymnasium's, dm_control's and envpool's.

Whatever the source, an environment of this package reads ``action`` in [-1, 1] and writes ``observation`` as one
float32 vector, ``reward``, ``terminated``, ``truncated`` and ``done`` [..., 1], the undiscounted return so far
(``episode_reward``) and the step number (``step_count``).
"""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl._utils import seed_generator
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import (
    ActionScaling,
    CatTensors,
    Compose,
    DMControlEnv,
    DoubleToFloat,
    EnvBase,
    FlattenObservation,
    GymWrapper,
    RewardSum,
    SerialEnv,
    StepCounter,
    Transform,
    TransformedEnv,
)

from qsm_lightning import toy  # noqa: F401  # registers its environment
from qsm_lightning.continuous import (
    CONTINUOUS,
    TERMINAL_REWARD,
    TIME_STEP,
    ContinuousTime,
    MovingAction,
    Timed,
    time_dm_control,
    time_gym,
)
from qsm_lightning.env_faults import Guarded, ProcessEnv
from qsm_lightning.env_state import copies
from qsm_lightning.errors import EnvironmentFault, SettingError, one_line, require, require_package
from qsm_lightning.theory import lq_env  # noqa: F401  # registers its environment
from qsm_lightning.watch import beat

LARGEST = float(np.finfo(np.float32).max)
# Observation keys that envpool adds to a dm_control task for the sake of its domain's other tasks.
ENVPOOL_EXTRA_KEYS = {
    **dict.fromkeys(("DogStand", "DogWalk", "DogTrot", "DogRun"), {"target_position", "ball_state"}),
    "FingerSpin": {"dist_to_target", "target_position"},
    "FishUpright": {"target"},
    **dict.fromkeys(("HumanoidStand", "HumanoidWalk", "HumanoidRun"), {"position"}),
    "HumanoidRunPureState": {"torso_vertical", "com_velocity", "head_height", "extremities", "joint_angles"},
    **dict.fromkeys(("QuadrupedWalk", "QuadrupedRun"), {"target_position", "ball_state", "origin", "rangefinder"}),
    "QuadrupedEscape": {"target_position", "ball_state"},
    "QuadrupedFetch": {"origin", "rangefinder"},
}


MOST_COPIES = 10_000  # of one environment


def make_env(name: str, num_envs: int = 1, processes: bool = False, timeout: float = 60.0) -> EnvBase:
    """Build ``num_envs`` copies of an environment, stepped together.

    Args:
        name: a gymnasium id (``Hopper-v5``, or ``module:Id-v0`` to import ``module`` first), ``dmc:domain/task``, or
            ``envpool:`` followed by one of envpool's ids. ``continuous:`` before one of the first two has frames carry
            their time step, and takes the options of :class:`~qsm_lightning.continuous.ContinuousTime` after a ``?``.
        num_envs: batch size of the environment; 1 gives an environment without batch dimension, unless ``processes``.
        processes: give each copy a process of its own; envpool has its own threads and takes no notice.
        timeout: seconds after which a process that does not answer counts as hanging.

    Raises:
        SettingError: unknown name, missing extra, or actions that are not a bounded Box.
    """
    own, time = in_continuous_time(name)
    source, _, task = own.partition(":")
    if source == "envpool":
        env: EnvBase = EnvpoolEnv(task, num_envs)
        env.source = name
        return TransformedEnv(env, Compose(RewardSum(), StepCounter()))
    single = partial(_dmc_env, name, task, time) if source == "dmc" else partial(_gym_env, name, own, time)
    env = probe = single()
    transforms = _transforms(probe, time)
    if processes or num_envs > 1:
        probe.close()
        env = (
            ProcessEnv([single] * num_envs, source=name, timeout=timeout) if processes else SerialEnv(num_envs, single)
        )
    return TransformedEnv(env, Compose(*transforms))


def in_continuous_time(name: str) -> tuple[str, ContinuousTime | None]:
    """An environment's own name, and what is asked of its time."""
    source, _, rest = name.partition(":")
    if source != CONTINUOUS:
        return name, None
    time = ContinuousTime.parse(rest)
    require(
        not time.env.startswith("envpool:"),
        f"data.env is {name!r}: envpool does not tell its time steps; use the environment's gymnasium or dmc: name",
    )
    return time.env, time


def _transforms(env: EnvBase, time: ContinuousTime | None) -> list[Transform]:
    """What turns a single environment's frames into those of this package."""
    transforms: list[Transform] = []
    if isinstance(env, DMControlEnv):
        keys = [
            key for key in env.observation_spec.keys(True, True) if key not in ("pixels", TIME_STEP, TERMINAL_REWARD)
        ]
        if grids := [key for key in keys if env.observation_spec[key].ndim > 1]:
            transforms.append(FlattenObservation(-2, -1, grids))
        transforms += [
            CatTensors(sorted(keys), "observation"),
            DoubleToFloat(in_keys=["observation", "reward"], in_keys_inv=["action"]),
        ]
        space = env.action_spec.space
        if (space.low != -1).any() or (space.high != 1).any():
            transforms.append(ActionScaling())
    if time is not None and (time.max_speed or time.horizon):
        transforms.append(MovingAction(time, env.action_spec.shape[-1]))
    return [*transforms, RewardSum(), StepCounter()]


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Which of ``known`` may be meant, as a question; empty where none is like ``name``."""
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {prefix}{near[0]}?" if near and near[0] != name else ""


def _checked_actions(name: str, space: gym.Space[Any]) -> gym.spaces.Box:
    if not isinstance(space, gym.spaces.Box):
        raise SettingError(
            f"data.env is {name!r}: its actions are {space}, and a diffusion policy needs a continuous Box action "
            "space; choose an environment with continuous actions, such as Pendulum-v1"
        )
    _check_bounds(name, space.low, space.high)
    return space


def _check_bounds(name: str, low: np.ndarray, high: np.ndarray) -> None:
    require(
        low.ndim == 1 and low.size > 0,
        f"data.env is {name!r}: its actions have the shape {low.shape}, and a policy gives a vector; flatten them in a "
        "gymnasium.ActionWrapper",
    )
    require(
        np.issubdtype(low.dtype, np.floating),
        f"data.env is {name!r}: its actions are whole numbers ({low.dtype}), and a diffusion policy's are not; round "
        "them in a gymnasium.ActionWrapper",
    )
    require(
        np.isfinite(low).all() and np.isfinite(high).all(),
        f"data.env is {name!r}: its actions are unbounded, and only bounded ones can be scaled to [-1, 1]; "
        "wrap it in gymnasium.wrappers.ClipAction or choose another environment",
    )
    require(
        (low < high).all(),
        f"data.env is {name!r}: component {np.argmin(low < high)} of its actions has one value alone; leave it out "
        "in a gymnasium.ActionWrapper",
    )


def make_gym(name: str, **kwargs: Any) -> gym.Env:
    """``gymnasium.make`` with observations as one float32 vector and actions in [-1, 1]."""
    try:
        env = gym.make(name, disable_env_checker=True, **kwargs)
    except Exception as error:  # its constructor may raise anything
        hint = _nearest(name, gym.registry) or "see gymnasium.registry for the known ids"
        raise SettingError(f"data.env is {name!r}: gymnasium cannot make it ({one_line(error)}); {hint}") from error
    space = _checked_actions(name, env.action_space)
    if (
        not isinstance(env.observation_space, gym.spaces.Box)
        or env.observation_space.shape is None
        or len(env.observation_space.shape) != 1
    ):
        env = gym.wrappers.FlattenObservation(env)
    require(
        isinstance(env.observation_space, gym.spaces.Box),
        f"data.env is {name!r}: its observations are {env.observation_space}, which is not a vector of set length; "
        "choose another",
    )
    if env.observation_space.dtype != np.float32:
        env = gym.wrappers.DtypeObservation(env, np.float32)
    if (space.low != -1).any() or (space.high != 1).any():
        env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return env


class GuardedGymWrapper(Guarded, GymWrapper):
    """A gymnasium environment whose faults carry its name."""

    def step_array(self, action: np.ndarray, observation: np.ndarray) -> tuple[float, bool, bool]:
        """A step without TensorDicts, with the same faults.

        Args:
            action: [A].
            observation: where the next one goes, [O].

        Returns:
            Reward, and whether the episode terminated or was truncated.
        """
        beat()
        try:
            found, reward, terminated, truncated, _ = self._env.step(action)
            self._take(found, observation)
            if not abs(reward) <= LARGEST:
                raise EnvironmentFault("reward is NaN or infinite")
        except (Exception, SystemExit) as error:
            raise self._fault(error) from error
        return reward, terminated, truncated

    def reset_array(self, observation: np.ndarray) -> None:
        """Begin an episode; its first observation goes into ``observation`` [O]."""
        beat()
        try:
            self._take(self._env.reset()[0], observation)
        except (Exception, SystemExit) as error:
            raise self._fault(error) from error

    @staticmethod
    def _take(found: Any, observation: np.ndarray) -> None:
        found = np.asarray(found)
        if found.shape != observation.shape:
            raise EnvironmentFault(
                f"observation has the shape {list(found.shape)} instead of {list(observation.shape)}"
            )
        with np.errstate(over="ignore"):
            observation[...] = found
        if not np.isfinite(observation).all():
            raise EnvironmentFault("observation is NaN or infinite")


def gym_copies(env: EnvBase) -> list[GuardedGymWrapper] | None:
    """The copies in an environment of :func:`make_env` that are gymnasium's and in this process; None for others."""
    found = copies(env)
    return found if all(type(copy) is GuardedGymWrapper for copy in found) else None


class GuardedTimedGymWrapper(Guarded, Timed, GymWrapper):
    """A gymnasium environment in continuous time whose faults carry its name."""


def _gym_env(source: str, name: str, time: ContinuousTime | None = None, **kwargs: Any) -> Any:
    raw = make_gym(name, **kwargs)
    env: GuardedGymWrapper | GuardedTimedGymWrapper
    if time is None:
        env = GuardedGymWrapper(raw)
    else:
        env = GuardedTimedGymWrapper(raw)
        time_gym(env, name, time)
    env.source = source
    return env


def make_render_env(name: str) -> tuple[EnvBase, Callable[[], np.ndarray]]:
    """A single environment like :func:`make_env`'s, and a function that renders its present state [H, W, 3]."""
    own, time = in_continuous_time(name)
    source = own.partition(":")[0]
    require(source != "envpool", f"{name} cannot be rendered: evaluate it under its gymnasium or dmc: name")
    if source == "dmc":
        env = make_env(name)
        physics = env.base_env._env.physics
        return env, partial(physics.render, 240, 320, camera_id=0)
    try:
        single = _gym_env(name, own, time, render_mode="rgb_array")
    except SettingError as error:
        raise SettingError(f"{name} cannot be rendered: {error}") from error
    return TransformedEnv(single, Compose(*_transforms(single, time))), single._env.render


def _require_extra(module: str, extra: str, name: str) -> ModuleType:
    require_package(module, extra, f"data.env is {name!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dm_control looks for a display when it is imported
        return importlib.import_module(module)


def _dmc_env(source: str, task: str, time: ContinuousTime | None = None) -> EnvBase:
    name = f"dmc:{task}"
    _require_extra("dm_control", "dmc", name)
    suite = _require_extra("dm_control.suite", "dmc", name)
    domain, _, task = task.partition("/")
    known = [f"dmc:{d}/{t}" for d, t in suite.ALL_TASKS]
    if name not in known:
        hint = _nearest(name, known) or "write it as dmc:domain/task, such as dmc:cartpole/swingup"
        raise SettingError(f"data.env is {name!r}: dm_control has no such task; {hint}")
    env: EnvBase
    if time is None:
        env = GuardedDMControlEnv(domain, task, random=0)  # lqr draws its springs when it is built
    else:
        env = GuardedTimedDMControlEnv(domain, task, random=0)
        time_dm_control(env, name, time)
    env.source = source
    _check_bounds(name, env.action_spec.space.low.numpy(), env.action_spec.space.high.numpy())
    return env


class GuardedDMControlEnv(Guarded, DMControlEnv):
    """A dm_control task whose faults carry its name: a simulation that blows up ends in a sentence."""


class GuardedTimedDMControlEnv(Guarded, Timed, DMControlEnv):
    """A dm_control task in continuous time whose faults carry its name."""


class EnvpoolTask(EnvBase):
    """envpool's gymnasium interface as a TorchRL environment with batch size [num_envs].

    Only the task's own observation keys are used, concatenated in sorted order.
    """

    def __init__(self, task: str, num_envs: int) -> None:
        super().__init__(batch_size=[num_envs])
        name = f"envpool:{task}"
        self._envpool = _require_extra("envpool", "envpool", name)
        self._task = task
        known = self._envpool.list_all_envs()
        if task not in known:
            hint = _nearest(task, known, "envpool:") or "see envpool.list_all_envs()"
            raise SettingError(f"data.env is {name!r}: envpool has no such environment; {hint}")
        self._set_seed(0)
        space = _checked_actions(name, self._env.action_space)
        self._mid, self._half = (space.high + space.low) / 2, (space.high - space.low) / 2
        width = self._observation(self._env.reset()[0]).shape[-1]
        self.observation_spec = Composite(observation=Unbounded((num_envs, width)), shape=(num_envs,))
        self.action_spec = Bounded(-1, 1, (num_envs, *space.shape))
        self.reward_spec = Unbounded((num_envs, 1))
        flag = Binary(1, (num_envs, 1), dtype=torch.bool)
        self.done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=(num_envs,))

    def _set_seed(self, seed: int | None) -> None:
        """envpool takes its seeds when it is made, of 31 bits: one after the other, as a batch of others has them."""
        seeds = [seed or 0]
        while len(seeds) < self.batch_size[0]:
            seeds.append(seed_generator(seeds[-1]))
        own = [seed & 0x7FFFFFFF for seed in seeds]
        self._env = self._envpool.make(self._task, env_type="gymnasium", num_envs=len(own), seed=own)

    def _observation(self, raw: Any) -> torch.Tensor:
        if isinstance(raw, dict):
            extra = ENVPOOL_EXTRA_KEYS.get(self._task.partition("-")[0], set())
            raw = np.concatenate([raw[k].reshape(len(raw[k]), -1) for k in sorted(set(raw) - extra)], -1)
        return torch.from_numpy(np.ascontiguousarray(raw.reshape(len(raw), -1), np.float32))

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is None:
            self._last = self._observation(self._env.reset()[0])
        else:
            ids = mask.view(-1).nonzero().view(-1)
            self._last = self._last.clone()
            self._last[ids] = self._observation(self._env.reset(ids.numpy().astype(np.int32))[0])
        return TensorDict({"observation": self._last}, self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = self._mid + self._half * tensordict["action"].numpy()
        raw, reward, terminated, truncated, _ = self._env.step(action.astype(self._env.action_space.dtype))
        self._last = self._observation(raw)
        flags = {
            "terminated": terminated,
            "truncated": truncated & ~terminated,
            "done": terminated | truncated,
        }
        return TensorDict(
            {
                "observation": self._last,
                "reward": torch.from_numpy(reward.astype(np.float32))[:, None],
                **{key: torch.from_numpy(flag)[:, None] for key, flag in flags.items()},
            },
            self.batch_size,
        )


class EnvpoolEnv(Guarded, EnvpoolTask):
    """envpool's environments, with faults that carry their name."""
