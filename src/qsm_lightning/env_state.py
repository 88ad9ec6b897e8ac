"""The exact state of environments: taken for a checkpoint, put back when a run goes on.

With :mod:`qsm_lightning.envs` the only file that knows gymnasium and dm_control from inside.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium.envs.mujoco import MujocoEnv
from torchrl.envs import DMControlEnv, EnvBase, GymWrapper, SerialEnv

from qsm_lightning.plain import NotPlainError, decode, encode

PHYSICS_TYPES = (mujoco.MjModel, mujoco.MjData)
PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION
# What mj_step leaves one substep behind the state: gymnasium's rewards and observations read it before the next step.
LAGGING = (
    *("xpos", "xipos", "xquat", "xmat", "ximat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat"),
    *("subtree_com", "cinert", "cvel", "cfrc_ext", "qfrc_actuator", "qfrc_constraint", "qacc", "actuator_force"),
    "sensordata",
)
# Parts of a compiled model that no task changes and that can be large.
ASSETS = ("mesh_", "tex_", "skin_", "bvh_", "oct_", "flex_", "names", "paths", "text_")


class NoStateError(Exception):
    """The environment cannot give its state; the message says why."""


def env_states(env: EnvBase) -> list[dict[str, Any]]:
    """The state of each copy in an environment of :func:`qsm_lightning.envs.make_env`, as plain data.

    Raises:
        NoStateError: where a copy's state is out of reach or of unknown kind.
    """
    return [_get(single) for single in copies(env)]


def load_env_states(env: EnvBase, states: list[dict[str, Any]]) -> None:
    """Put every copy into the state taken by :func:`env_states`; the copies are reset first, by the caller.

    Raises:
        NoStateError: where a copy cannot take a state.
    """
    for single, state in zip(copies(env), states, strict=True):
        _set(single, state)


def copies(env: EnvBase) -> list[EnvBase]:
    """The single environments in one of :func:`~qsm_lightning.envs.make_env`."""
    base = env.base_env
    return list(base._envs) if isinstance(base, SerialEnv) else [base]


def _get(env: EnvBase) -> dict[str, Any]:
    if isinstance(env, DMControlEnv):
        control = env._env
        return {
            "model": _model_arrays(control.physics.model.ptr),
            "physics": _physics(control.physics.model.ptr, control.physics.data.ptr),
            "task": _attributes(control.task),
            "control": {name: getattr(control, name) for name in ("_step_count", "_reset_next_step")},
        }
    state: dict[str, Any] = {"chain": [_attributes(part) for part in _chain(env)]}
    inner = env._env.unwrapped
    if isinstance(inner, MujocoEnv):
        state["model"] = _model_arrays(inner.model)
        state["physics"] = _physics(inner.model, inner.data)
        state["lagging"] = {k: torch.from_numpy(getattr(inner.data, k).copy()) for k in LAGGING}
    return state


def _set(env: EnvBase, state: dict[str, Any]) -> None:
    if isinstance(env, DMControlEnv):
        control = env._env
        model, data = control.physics.model.ptr, control.physics.data.ptr
        _set_model_arrays(model, state["model"])
        _set_attributes(control.task, state["task"])
        _set_physics(model, data, state["physics"])
        mujoco.mj_forward(model, data)
        _set_physics(model, data, state["physics"])  # mj_forward moved the solver's warm start
        for name, value in state["control"].items():
            setattr(control, name, value)
        return
    parts = list(_chain(env))  # first: whether it has a state at all
    for part, attributes in zip(parts, state["chain"], strict=True):
        _set_attributes(part, attributes)
    inner = env._env.unwrapped
    if isinstance(inner, MujocoEnv):
        _set_model_arrays(inner.model, state["model"])
        _set_physics(inner.model, inner.data, state["physics"])
        for name, value in state["lagging"].items():
            getattr(inner.data, name)[...] = value.numpy()


def _chain(env: EnvBase) -> Iterator[Any]:
    """A gymnasium environment's wrappers, outermost first, and the environment itself."""
    if not isinstance(env, GymWrapper):
        raise NoStateError("its state is in another process or library")
    part = env._env
    while isinstance(part, gym.Wrapper):
        yield part
        part = part.env
    yield part


def _attributes(owner: Any) -> dict[str, Any]:
    """What an object remembers in attributes of plain types; raises for one whose state is of unknown kind."""
    if callable(getattr(owner, "state_dict", None)) and callable(getattr(owner, "load_state_dict", None)):
        return {"own": encode(owner.state_dict())}
    out, spaces = {}, {}
    for name, value in vars(owner).items():
        if _is_fixed(name, value) or (isinstance(owner, MujocoEnv) and isinstance(value, PHYSICS_TYPES)):
            continue
        try:
            if isinstance(value, gym.Space):
                spaces[name] = _space_generators(value)
            else:
                out[name] = encode(value)
        except NotPlainError as error:
            raise NoStateError(f"its attribute {name} is a {error}, whose state is not known") from error
    return {"attributes": out, "spaces": {name: states for name, states in spaces.items() if any(states)}}


def _parts(space: gym.Space) -> list[gym.Space]:
    """A space and the spaces it is made of."""
    inner = getattr(space, "spaces", ())
    return [space, *(part for s in (inner.values() if isinstance(inner, dict) else inner) for part in _parts(s))]


def _space_generators(space: gym.Space) -> list[Any]:
    """The generators of a space and its parts, None for those that were never drawn from."""
    return [None if part._np_random is None else encode(part._np_random) for part in _parts(space)]


def _set_attributes(owner: Any, state: dict[str, Any]) -> None:
    if "own" in state:
        owner.load_state_dict(decode(state["own"]))
        return
    for name, value in state["attributes"].items():
        setattr(owner, name, decode(value, getattr(owner, name, None)))
    for name, states in state["spaces"].items():
        for part, generator in zip(_parts(getattr(owner, name)), states, strict=True):
            if generator is not None:
                decode(generator, part.np_random)


def _is_fixed(name: str, value: Any) -> bool:
    """Parts that do not change from step to step, or have their own place in the state: model, wrapped env, spaces."""
    return (
        name in ("_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs")  # how it was made
        or (name == "env" and isinstance(value, gym.Env))
        or isinstance(value, (ModuleType, gym.envs.registration.EnvSpec))
        or type(value).__name__ in ("MujocoRenderer", "Surface", "Clock")
        or inspect.isroutine(value)
        or inspect.isclass(value)
    )


def _physics(model: Any, data: Any) -> torch.Tensor:
    state = np.empty(mujoco.mj_stateSize(model, PHYSICS))
    mujoco.mj_getState(model, data, state, PHYSICS)
    return torch.from_numpy(state)


def _set_physics(model: Any, data: Any, state: torch.Tensor) -> None:
    mujoco.mj_setState(model, data, state.numpy(), PHYSICS)


def _model_arrays(model: Any) -> dict[str, torch.Tensor]:
    """The floating-point arrays of a model: some tasks move targets and resize bodies at a reset."""
    out = {}
    for name in dir(model):
        if name.startswith(("_", *ASSETS)):
            continue
        value = getattr(model, name)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            out[name] = torch.from_numpy(np.array(value))
    return out


def _set_model_arrays(model: Any, arrays: dict[str, torch.Tensor]) -> None:
    for name, value in arrays.items():
        getattr(model, name)[...] = value.numpy()
