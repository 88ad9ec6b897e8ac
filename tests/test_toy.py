"""The toy with two optimal first actions: its optimum by search, its symmetry, and that its name is enough."""

from __future__ import annotations

from functools import cache

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from qsm_lightning import trust
from qsm_lightning.envs import make_env
from qsm_lightning.toy import EPISODE_FRAMES, TwoGoals

NAME = "qsm_lightning/TwoGoals-v0"
ACTIONS = np.arange(-16, 17) / 16  # each moves by a multiple of 1/8


def step(position: float, action: float) -> tuple[float, float]:
    """Where a step leads from a position, and its reward."""
    env = TwoGoals()
    env.position = position
    _, reward, terminated, truncated, _ = env.step(np.array([action], np.float32))
    assert not terminated
    assert not truncated
    return env.position, reward


@cache
def values(position: float, left: int = EPISODE_FRAMES) -> np.ndarray:
    """The greatest return with ``left`` steps to go after each of :data:`ACTIONS`, by trying everything."""
    steps = [step(position, action) for action in ACTIONS]
    return np.array([reward + (values(x, left - 1).max() if left > 1 else 0.0) for x, reward in steps])


def test_the_optimum_by_search() -> None:
    """0, by two first actions."""
    assert values(0.0).max() == 0
    assert ACTIONS[values(0.0) == 0].tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("position", [-3.0, -0.625, 0.0, 0.25, 1.0])
def test_an_action_that_the_best_follow_is_worth_its_reward(position: float) -> None:
    ends = np.clip(position + 2 * ACTIONS, -3, 3)
    assert np.array_equal(values(position), -((np.abs(ends) - 1) ** 2))


def episode(actions: list[float]) -> tuple[list[float], list[float]]:
    """The positions and rewards of a whole episode, from its start on."""
    env = gym.make(NAME)
    assert env.reset(seed=0)[0].tolist() == [0.0]
    steps = [env.step(np.array([action], np.float32)) for action in actions]
    assert [truncated for _, _, _, truncated, _ in steps] == [False] * (EPISODE_FRAMES - 1) + [True]
    return [float(observation[0]) for observation, *_ in steps], [float(reward) for _, reward, *_ in steps]


def test_the_mean_of_the_two_goes_nowhere() -> None:
    assert episode([0.0] * EPISODE_FRAMES) == ([0.0] * EPISODE_FRAMES, [-1.0] * EPISODE_FRAMES)


@pytest.mark.parametrize("bound", [-1.0, 1.0])
def test_a_bound_is_as_bad(bound: float) -> None:
    assert step(0.0, bound) == (2 * bound, -1.0)


def test_mirrored_actions_have_the_same_rewards() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (50, EPISODE_FRAMES))
    for one in actions.tolist():
        positions, rewards = episode(one)
        mirrored, same = episode([-action for action in one])
        assert mirrored == [-position for position in positions]
        assert same == rewards


def test_gymnasium_finds_no_fault() -> None:
    check_env(gym.make(NAME).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("processes", [False, True])
def test_it_is_an_environment_by_name(processes: bool) -> None:
    """Also in a new process, which has imported nothing of this one."""
    env = make_env(NAME, 1, processes=processes)
    assert env.rollout(2)["observation"].shape[-1] == 1
    env.close()


def test_runs_of_it_need_no_trust() -> None:
    trust.check_env(NAME, "a run")
