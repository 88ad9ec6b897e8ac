"""An environment put into the state of another goes on exactly as that one, bit by bit."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase

from qsm_lightning.env_state import NoStateError, env_states, load_env_states
from qsm_lightning.envs import make_env
from tests.helpers import needs_dmc, needs_envpool

MUJOCO = (
    *("Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum", "InvertedPendulum"),
    *("Pusher", "Reacher", "Swimmer", "Walker2d"),
)
OTHER = (
    "Pendulum-v1",
    "MountainCarContinuous-v0",
    "tests.fake_envs:Clock-v0",
    "tests.fake_envs:Wanderer-v0",
    "qsm_lightning/TwoGoals-v0",
)
# One task of each domain, and those that change their model; the rest are in the slow test.
DMC = (
    *("acrobot/swingup", "ball_in_cup/catch", "cartpole/swingup", "cheetah/run", "finger/turn_hard", "fish/swim"),
    *("hopper/hop", "humanoid/walk", "lqr/lqr_2_1", "pendulum/swingup", "point_mass/hard", "quadruped/walk"),
    *("reacher/hard", "swimmer/swimmer6", "walker/run"),
)


def roll(env: Any, step: TensorDictBase, count: int, noise: torch.Generator) -> tuple[list[Any], TensorDictBase]:
    """``count`` steps of random actions, over the ends of episodes; what was seen, and where it stands."""
    seen = []
    for _ in range(count):
        step["action"] = 2 * torch.rand(env.action_spec.shape, generator=noise) - 1
        done, step = env.step_and_maybe_reset(step)
        seen.append(done["next"].select("observation", "reward", "done", "step_count", "episode_reward").clone())
    return seen, step


def check(name: str, num_envs: int, before: int, after: int) -> None:
    env = make_env(name, num_envs)
    env.set_seed(3)
    noise = torch.Generator().manual_seed(0)
    _, step = roll(env, env.reset(), before, noise)
    file = io.BytesIO()
    torch.save((env_states(env), step.to_dict(), noise.get_state()), file)
    expected, _ = roll(env, step.clone(), after, noise)
    states, carrier, noise_state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other = make_env(name, num_envs)
    other.set_seed(77)
    start = other.reset()
    roll(other, start.clone(), 3, torch.Generator().manual_seed(9))
    load_env_states(other, states)
    noise.set_state(noise_state)
    seen, _ = roll(other, start.empty().update(carrier), after, noise)
    for number, (one, two) in enumerate(zip(expected, seen, strict=True)):
        assert (one == two).all(), f"step {number} differs: {one.to_dict()} and {two.to_dict()}"


@pytest.mark.parametrize("name", [*(f"{name}-v5" for name in MUJOCO), *OTHER])
def test_gymnasium(name: str) -> None:
    check(name, 1, before=137, after=250)


@pytest.mark.parametrize("name", ["Ant-v5", "Pendulum-v1"])
def test_several_copies(name: str) -> None:
    check(name, 3, before=40, after=170)


@needs_dmc
@pytest.mark.parametrize("task", DMC)
def test_dm_control(task: str) -> None:
    check(f"dmc:{task}", 1, before=137, after=150)


@needs_dmc
def test_a_new_episode_of_dm_control_begins_alike() -> None:
    """Episodes last 1,000 steps; the next start is drawn from the task's own generator, and moves the model's parts."""
    check("dmc:reacher/easy", 1, before=900, after=150)


@pytest.mark.slow
@needs_dmc
def test_every_task_of_dm_control() -> None:
    from dm_control import suite

    for domain, task in suite.ALL_TASKS:
        before, after = (37, 50) if domain == "lqr" else (137, 1000)  # random actions blow its six masses up later
        check(f"dmc:{domain}/{task}", 1, before, after)


def test_a_state_does_not_change_with_its_environment() -> None:
    env = make_env("Hopper-v5")
    env.set_seed(0)
    _, step = roll(env, env.reset(), 5, torch.Generator().manual_seed(0))
    state = env_states(env)[0]
    physics, lagging = state["physics"].clone(), state["lagging"]["qacc"].clone()
    roll(env, step, 5, torch.Generator().manual_seed(1))
    assert torch.equal(state["physics"], physics)
    assert torch.equal(state["lagging"]["qacc"], lagging)


def test_an_environment_may_tell_its_state_itself() -> None:
    check("tests.fake_envs:Own-v0", 1, before=7, after=20)


def test_unknown_attributes_are_not_passed_over() -> None:
    with pytest.raises(NoStateError, match="its attribute secret is a object"):
        env_states(make_env("tests.fake_envs:Secret-v0"))


@needs_envpool
def test_envpool_gives_no_state() -> None:
    with pytest.raises(NoStateError, match="another process or library"):
        env_states(make_env("envpool:Pendulum-v1", 2))


@pytest.mark.parametrize("name", ["Pendulum-v1", pytest.param("dmc:cartpole/swingup", marks=needs_dmc)])
def test_processes_give_and_take_no_state(name: str) -> None:
    env = make_env(name, 1, processes=True)
    with pytest.raises(NoStateError, match="another process or library"):
        env_states(env)
    with pytest.raises(NoStateError, match="another process or library"):
        load_env_states(env, env_states(make_env(name)))
