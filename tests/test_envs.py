"""Environments by name: one interface whatever the source, and one sentence for each that cannot be used."""

from __future__ import annotations

import importlib.util
import re
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torchrl._utils import seed_generator

from qsm_lightning import envs
from qsm_lightning.envs import ENVPOOL_EXTRA_KEYS, make_env, make_gym
from qsm_lightning.errors import SettingError
from tests.fake_envs import Clock
from tests.helpers import needs_dmc, needs_envpool


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize(
    ("name", "observation_dim", "action_dim"),
    [
        ("Pendulum-v1", 3, 1),
        ("Hopper-v5", 11, 3),
        pytest.param("dmc:walker/walk", 24, 6, marks=needs_dmc),
        pytest.param("dmc:cartpole/swingup", 5, 1, marks=needs_dmc),
        pytest.param("envpool:Hopper-v5", 11, 3, marks=needs_envpool),
        pytest.param("envpool:WalkerWalk-v1", 24, 6, marks=needs_envpool),
    ],
)
def test_one_interface(name: str, observation_dim: int, action_dim: int, num_envs: int) -> None:
    env = make_env(name, num_envs)
    env.set_seed(0)
    steps = env.rollout(60, break_when_any_done=False)
    batch = (num_envs,) if num_envs > 1 or name.startswith("envpool") else ()
    assert steps["observation"].shape == (*batch, 60, observation_dim)
    assert steps["action"].shape == (*batch, 60, action_dim)
    for key in ("observation", "action", ("next", "observation"), ("next", "reward")):
        assert steps[key].dtype == torch.float32
    assert steps["next", "terminated"].dtype == torch.bool
    low, high = env.action_spec.space.low, env.action_spec.space.high
    assert (low == -1).all()
    assert (high == 1).all()
    assert steps["action"].abs().max() <= 1
    env.close()


@pytest.mark.parametrize(
    "name",
    [
        "Hopper-v5",
        pytest.param("dmc:cheetah/run", marks=needs_dmc),
        pytest.param("dmc:lqr/lqr_2_1", marks=needs_dmc),  # draws its springs when it is built
        pytest.param("envpool:Hopper-v5", marks=needs_envpool),
    ],
)
def test_the_seed_decides_the_episode(name: str) -> None:
    def rollout(seed: int) -> torch.Tensor:
        env = make_env(name, 2)
        env.set_seed(seed)
        torch.manual_seed(0)
        return env.rollout(30, break_when_any_done=False)["next", "observation"]

    first = rollout(1)
    assert torch.equal(first, rollout(1))
    assert not torch.equal(first, rollout(2))
    assert not torch.equal(first[0], first[1]), "parallel environments share a seed"


@pytest.mark.parametrize(("low", "mid", "high"), [(-2, 2, 6), (0, 0.5, 1), (-1, 0.5, 2), (-3, -1, 1)])
def test_actions_are_scaled_to_the_environments_bounds(
    low: float, mid: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clock returns its actions as the reward."""
    monkeypatch.setattr(Clock, "action_space", gym.spaces.Box(low, high, (1,), np.float32))
    env = make_env("tests.fake_envs:Clock-v0")
    for action, expected in ((-1.0, low), (0.0, mid), (1.0, high)):
        step = env.step(env.reset().set("action", torch.tensor([action])))
        assert step["next", "reward"].item() == pytest.approx(expected)


def test_dictionary_observations_are_concatenated_in_sorted_order() -> None:
    observation = make_env("tests.fake_envs:Parts-v0").reset()["observation"]
    assert torch.equal(observation, torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]))


@needs_dmc
def test_dm_control_observations_are_the_sorted_parts_and_truncate() -> None:
    from dm_control import suite

    raw = suite.load("walker", "walk", task_kwargs={"random": 3}).observation_spec()
    assert sorted(raw) == ["height", "orientations", "velocity"]
    env = make_env("dmc:walker/walk")
    env.set_seed(0)
    state = env.reset()
    height = env.base_env._env.physics.torso_height()
    assert state["observation"][0].item() == pytest.approx(height, rel=1e-6)
    steps = env.rollout(1100)
    assert len(steps) == 1000
    assert steps["next", "truncated"][-1]
    assert not steps["next", "terminated"].any()


@needs_dmc
@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize("name", ["manipulator/bring_ball", "stacker/stack_2"])
def test_dm_control_observations_with_rows_are_flattened(name: str, num_envs: int) -> None:
    env = make_env(f"dmc:{name}", num_envs)
    env.set_seed(0)
    observation = env.reset()["observation"].reshape(num_envs, -1)
    control = (env.base_env._envs[-1] if num_envs > 1 else env.base_env)._env
    parts = control.task.get_observation(control.physics)
    assert any(part.ndim > 1 for part in parts.values())
    expected = np.concatenate([np.ravel(parts[key]) for key in sorted(parts)])
    np.testing.assert_allclose(observation[-1].numpy(), expected, rtol=1e-6)
    assert env.rollout(3)["next", "observation"].shape[-1] == len(expected)


class Pool:
    """In place of an environment of envpool's: returns its actions as rewards, and ends one episode in each way."""

    action_space = gym.spaces.Box(-2, 6, (1,), np.float32)
    terminated, truncated = np.array([False, True, False, True]), np.array([False, False, True, True])

    def reset(self, ids: np.ndarray | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros((4 if ids is None else len(ids), 2)), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        assert action.dtype == np.float32
        return np.zeros((4, 2)), action[:, 0], self.terminated, self.truncated, {}


def test_envpools_actions_and_ends_are_those_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time limit that comes with a terminal state does not count."""
    envpool = SimpleNamespace(list_all_envs=lambda: ["Pool-v0"], make=lambda *_, **__: Pool())
    monkeypatch.setattr(envs, "_require_extra", lambda *_: envpool)
    env = make_env("envpool:Pool-v0", 4)
    step = env.step(env.reset().set("action", torch.tensor([[-1.0], [0.0], [0.5], [1.0]])))["next"]
    assert step["reward"][:, 0].tolist() == [-2, 2, 4, 6]
    assert step["terminated"][:, 0].tolist() == [False, True, False, True]
    assert step["truncated"][:, 0].tolist() == [False, False, True, False]
    assert step["done"][:, 0].tolist() == [False, True, True, True]


@needs_envpool
@needs_dmc
@pytest.mark.parametrize("task", ["QuadrupedWalk", "HumanoidWalk", "FishUpright", "FingerSpin", "WalkerRun"])
def test_envpools_dm_control_tasks_have_dm_controls_observation(task: str) -> None:
    domain, name = re.findall("[A-Z][a-z]+", task)
    ours = make_env(f"envpool:{task}-v1", 2).observation_spec["observation"].shape[-1]
    assert ours == make_env(f"dmc:{domain.lower()}/{name.lower()}").observation_spec["observation"].shape[-1]
    assert (task in ENVPOOL_EXTRA_KEYS) == (task != "WalkerRun")


@needs_envpool
@pytest.mark.parametrize("seed", [3, 2**32 - 2])
def test_envpools_copies_are_seeded_as_others_are(seed: int) -> None:
    """Whatever number they are: each as if it were alone, with the seed that comes after the one before."""
    several = make_env("envpool:Hopper-v5", 3)
    several.set_seed(seed)
    together = several.reset()["observation"]
    for copy in together:
        alone = make_env("envpool:Hopper-v5", 1)
        alone.set_seed(seed)
        assert torch.equal(alone.reset()["observation"][0], copy)
        seed = seed_generator(seed)
    assert len(together.unique(dim=0)) == 3


@needs_envpool
def test_envpool_starts_a_new_episode_after_the_final_observation() -> None:
    env = make_env("envpool:Hopper-v5", 2)
    env.set_seed(0)
    steps = env.rollout(200, break_when_any_done=False)
    done = steps["next", "done"][..., 0]
    assert done.any()
    following = done.nonzero()[done.nonzero()[:, 1] < 199]
    for i, t in following.tolist():
        assert steps["next", "step_count"][i, t + 1] == 1
        assert not torch.equal(steps["next", "observation"][i, t], steps["observation"][i, t + 1])
        assert 1.2 < steps["observation"][i, t + 1, 0] < 1.3, "the first observation is not a fresh start"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Hoper-v5", ["data.env", "Hoper-v5", "did you mean Hopper-v5?"]),
        ("CartPole-v1", ["data.env", "Discrete(2)", "continuous"]),
        ("tests.fake_envs:Unbounded-v0", ["data.env", "unbounded", "ClipAction"]),
        ("tests.fake_envs:Stuck-v0", ["data.env", "component 1 of its actions has one value alone"]),
        ("tests.fake_envs:Whole-v0", ["data.env", "its actions are whole numbers (int64)"]),
        ("tests.fake_envs:Still-v0", ["data.env", "its actions have the shape (0,)"]),
        ("nowhere.at.all:Some-v0", ["data.env", "nowhere"]),
        ("tests.fake_envs:Words-v0", ["data.env", "Sequence", "not a vector of set length"]),
        pytest.param("dmc:walker/wlk", ["dmc:walker/wlk", "did you mean dmc:walker/walk?"], marks=needs_dmc),
        pytest.param("dmc:zzz", ["dmc:zzz", "dmc:domain/task"], marks=needs_dmc),
        pytest.param("envpool:Hoper-v5", ["did you mean envpool:Hopper-v5?"], marks=needs_envpool),
        pytest.param("envpool:CartPole-v1", ["Discrete(2)"], marks=needs_envpool),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(name: str, words: list[str]) -> None:
    with pytest.raises(SettingError) as error:
        make_env(name)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(("name", "extra"), [("dmc:cartpole/swingup", "dmc"), ("envpool:Hopper-v5", "envpool")])
def test_a_missing_extra_is_named(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec

    def without(module: str, package: str | None = None) -> Any:
        return None if module.partition(".")[0] in ("dm_control", "envpool") else find_spec(module, package)

    monkeypatch.setattr("importlib.util.find_spec", without)
    with pytest.raises(SettingError, match=rf"qsm-lightning\[{extra}\]"):
        make_env(name)


def test_no_wrapper_is_added_that_is_not_needed() -> None:
    env = make_gym("Hopper-v5")
    names = []
    while isinstance(env, gym.Wrapper):
        names.append(type(env).__name__)
        env = env.env
    assert "RescaleAction" not in names
    assert "FlattenObservation" not in names
    assert "DtypeObservation" in names
